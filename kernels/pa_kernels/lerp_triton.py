"""The dense lerp as one Triton launch per group of tensors that share dtypes and device."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import tiles
from pa_kernels.tiles import INTERPRETED, Launch

NARROW = Launch(block=2048, threads=128)
WIDE = Launch(block=2048, threads=256)
"""Launches where every tensor has one 16-bit dtype, and for all else: 64 bytes of loads in flight
per thread, 40 registers or fewer. Not yet timed on a GPU: chosen from offline compilation; the
bench sweeps CANDIDATES."""

CANDIDATES = tuple(
    Launch(each * threads, threads) for threads in (64, 128, 256, 512) for each in (8, 16, 32)
)
"""8, 16 and 32 weights a thread: 32, 64 and 128 bytes of loads in flight, 30, 40 and 72–91
registers (sm_90; 64 take 168)."""

OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
"""Fusion is off because its default may change: every fma of the contract is written out."""

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 to DTYPE, nearest-even. The interpreter's own cast to bf16 truncates, so there it goes
    through integers."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        u = x.to(tl.uint32, bitcast=True)
        nan = (u & 0x7FFFFFFF) > 0x7F800000
        y = (
            tl.where(nan, 0x7FC0, (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
            .to(tl.uint16)
            .to(tl.bfloat16, bitcast=True)
        )
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def widen(x, INTERPRET: tl.constexpr):
    """Exactly to fp32. The interpreter's own cast loses the subnormals of bf16, so there it goes
    through integers too."""
    if INTERPRET and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True) if x.dtype == tl.float32 else x.to(tl.int16, bitcast=True)


@triton.jit
def blend(near, far, scale, UP: tl.constexpr):
    """fma(scale, far − near, near) for fp32 lanes, in the one of its two equal forms whose weight
    is never positive:

    then a difference of +0 adds −0, which changes nothing, and where both sources are −0 so is the
    result.
    """
    return tl.fma(near - far, scale * -1.0, near) if UP else tl.fma(far - near, scale, near)


@triton.jit
def round_via(x, OUT: tl.constexpr, VIA: tl.constexpr, INTERPRET: tl.constexpr):
    if VIA != OUT:
        x = widen(round_to(x, VIA, INTERPRET), INTERPRET)
    return round_to(x, OUT, INTERPRET)


@triton.jit
def roles(lam):
    """Both branches of the contract in one form: the weight, and which source is `near` and which
    is `far`."""
    # `near` is the source that λ is closer to, and (1 − λ)(b − i) is (λ − 1)(i − b) exactly; + 0.0
    # turns a λ of −0 into 0
    base_near = tl.abs(lam) < 0.5
    scale = tl.where(base_near, lam, 1.0 - lam) + 0.0
    # at an endpoint both are the same source, so that its bits pass through whatever the other
    # holds
    return scale, base_near, base_near == (scale == 0)


@triton.jit
def unrounded(b, i, lam, INTERPRET: tl.constexpr):
    """lerp32 of any sources at all, lane by lane."""
    scale, base_near, base_far = roles(lam)
    near = tl.where(base_near, widen(b, INTERPRET), widen(i, INTERPRET))
    far = tl.where(base_far, widen(b, INTERPRET), widen(i, INTERPRET))
    return tl.where(bits(near) == bits(far), near, blend(near, far, scale, False))


@triton.jit
def keep_bits(
    w, b, i, lam, OUT: tl.constexpr, BASE: tl.constexpr, INST: tl.constexpr, VIA: tl.constexpr
):
    """`w`, or the bits of a source where the contract says that they survive."""
    if VIA == OUT:
        if BASE == OUT and INST == OUT:
            w = tl.where(bits(b) == bits(i), b, w)
        if BASE == OUT:
            w = tl.where(lam == 0.0, b, w)
        if INST == OUT:
            w = tl.where(lam == 1.0, i, w)
    return w


@triton.jit
def lerp_of(
    b,
    i,
    lam,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The contract for any sources at all, lane by lane."""
    w = round_via(unrounded(b, i, lam, INTERPRET), OUT, VIA, INTERPRET)
    return keep_bits(w, b, i, lam, OUT, BASE, INST, VIA)


@triton.jit
def full_blend(
    b_ptr,
    i_ptr,
    lanes,
    scale,
    base_near,
    base_far,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    UP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """lerp32 of the sources at `lanes` of a full tile."""
    if BASE == INST:
        near_ptr = tl.where(base_near, b_ptr, i_ptr).to(tl.pointer_type(BASE))
        far_ptr = tl.where(base_far, b_ptr, i_ptr).to(tl.pointer_type(BASE))
        near = widen(tl.load(tl.multiple_of(near_ptr, 16) + lanes), INTERPRET)
        far = widen(tl.load(tl.multiple_of(far_ptr, 16) + lanes), INTERPRET)
    else:
        b = widen(tl.load(tl.multiple_of(b_ptr.to(tl.pointer_type(BASE)), 16) + lanes), INTERPRET)
        i = widen(tl.load(tl.multiple_of(i_ptr.to(tl.pointer_type(INST)), 16) + lanes), INTERPRET)
        near = tl.where(base_near, b, i)
        far = tl.where(base_far, b, i)
    return blend(near, far, scale, UP)


@triton.jit
def full_tile(
    w_ptr,
    b_ptr,
    i_ptr,
    offset,
    scale,
    base_near,
    base_far,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    UP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    lanes = tl.multiple_of(offset, BLOCK) + tl.arange(0, BLOCK)
    x = full_blend(b_ptr, i_ptr, lanes, scale, base_near, base_far, BASE, INST, UP, INTERPRET)
    w = round_via(x, OUT, VIA, INTERPRET)
    tl.store(tl.multiple_of(w_ptr.to(tl.pointer_type(OUT)), 16) + lanes, w)


@triton.jit
def lerp_tile(
    word,
    sizes,
    outs,
    bases,
    insts,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Rewrite the tile that a word of the tile table names."""
    t = word >> 32
    offset = ((word & 0xFFFFFFFF) >> 1) * BLOCK
    lam = tl.load(lams + t)
    w_ptr, b_ptr, i_ptr = tl.load(outs + t), tl.load(bases + t), tl.load(insts + t)
    scale, base_near, base_far = roles(lam)
    if word & 1:
        if scale < 0:
            full_tile(
                w_ptr,
                b_ptr,
                i_ptr,
                offset,
                scale,
                base_near,
                base_far,
                OUT,
                BASE,
                INST,
                VIA,
                BLOCK,
                False,
                INTERPRET,
            )
        else:
            full_tile(
                w_ptr,
                b_ptr,
                i_ptr,
                offset,
                scale,
                base_near,
                base_far,
                OUT,
                BASE,
                INST,
                VIA,
                BLOCK,
                True,
                INTERPRET,
            )
    else:
        size = tl.load(sizes + t)
        end = tl.minimum(size, offset + BLOCK)
        while offset < end:
            lanes = offset + tl.arange(0, TAIL)
            inside = lanes < end
            b = tl.load(b_ptr.to(tl.pointer_type(BASE)) + lanes, mask=inside)
            i = tl.load(i_ptr.to(tl.pointer_type(INST)) + lanes, mask=inside)
            w = lerp_of(b, i, lam, OUT, BASE, INST, VIA, INTERPRET)
            tl.store(w_ptr.to(tl.pointer_type(OUT)) + lanes, w, mask=inside)
            offset += TAIL


@triton.jit
def lerp_kernel(
    words,
    sizes,
    outs,
    bases,
    insts,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    lerp_tile(word, sizes, outs, bases, insts, lams, OUT, BASE, INST, VIA, BLOCK, TAIL, INTERPRET)


def launch_for(*dtypes: torch.dtype) -> Launch:
    """The launch for tensors of these dtypes."""
    return NARROW if len(set(dtypes)) == 1 and dtypes[0].itemsize == 2 else WIDE


def constants(
    out: torch.dtype, base: torch.dtype, inst: torch.dtype, via: torch.dtype | None, launch: Launch
) -> dict[str, Any]:
    """The constexpr arguments of `lerp_kernel`. TAIL is two elements a thread, so that tails do not
    set the register count."""
    names = {"OUT": out, "BASE": base, "INST": inst, "VIA": via or out}
    dtypes = {name: TRITON_DTYPES[dtype] for name, dtype in names.items()}
    return {**dtypes, "BLOCK": launch.block, "TAIL": 2 * launch.threads, "INTERPRET": INTERPRETED}


class Group:
    """Tensors of one (out, base, inst, via) dtype tuple on one device, ready to be launched for any
    λ.

    Attributes:
        entries: places of the group's tensors in the caller's lists.
        lams: fp32 [T] on the device; what the next launch reads, a replayed CUDA graph included.
        kernel: what is launched.
    """

    kernel: Any = lerp_kernel

    def __init__(
        self,
        entries: Sequence[int],
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        inst: Sequence[Tensor],
        via: torch.dtype | None,
        launch: Launch | None = None,
    ):
        self.entries = tuple(entries)
        self.tensors = (tuple(out), tuple(base), tuple(inst))
        self.device = out[0].device
        self.lams = torch.zeros(len(out), dtype=torch.float32, device=self.device)
        self.launch = launch or launch_for(out[0].dtype, base[0].dtype, inst[0].dtype)
        self.constants = constants(out[0].dtype, base[0].dtype, inst[0].dtype, via, self.launch)
        totals = [
            b.sum(dtype=torch.float32).to(self.device) + i.sum(dtype=torch.float32).to(self.device)
            for b, i in zip(base, inst)
        ]
        finite = torch.stack(totals).isfinite()
        self.tiles = tiles.build(
            self.tensors, [w.numel() for w in out], self.launch.block, finite.tolist()
        )

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What the kernel reads a number of for each tensor, after the pointers."""
        return (self.lams,)

    def launch_(self) -> None:
        """Rewrite the live tensors for the λ in `lams`. Touches device memory only, so a CUDA graph
        can record it."""
        if self.tiles.count == 0:
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self.kernel[(self.tiles.count,)](
                self.tiles.words,
                self.tiles.sizes,
                *self.tiles.pointers,
                *self.tables,
                **self.constants,
                num_warps=self.launch.num_warps(),
                **OPTIONS,
            )

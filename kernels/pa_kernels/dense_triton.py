"""The dense lerp as one Triton launch per group of tensors that share dtypes, rounding and
device."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import tiles
from pa_kernels.checksum_triton import mix
from pa_kernels.reference import DRAW_STEP
from pa_kernels.switch import SwitchRow, TritonGroup
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

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, nearest-even. The interpreter's own cast to bf16 truncates, so there it goes
    through integers."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        u = x.to(tl.uint32, bitcast=True)
        nan = (u & 0x7FFFFFFF) > 0x7F800000
        y = tl.where(nan, 0x7FC0, (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
        y = y.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def widen(x):
    """Exactly to fp32. The interpreter's own cast loses the subnormals of bf16, so there it goes
    through integers too."""
    if INTERPRET and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_twice(x, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr):
    """fp32 to INTERMEDIATE, and that to OUT."""
    if INTERMEDIATE != OUT:
        x = widen(round_to(x, INTERMEDIATE))
    return round_to(x, OUT)


@triton.jit
def noise(draw, offset, COUNT: tl.constexpr):
    """`reference.noise` of COUNT elements from `offset` on, among which no index crosses 2³²;
    `draw` as in `DenseTritonGroup`."""
    first = ((draw >> 32) << 16) + offset
    salt = mix((first >> 32).to(tl.uint32) ^ draw.to(tl.uint32))
    return mix((first.to(tl.uint32) + tl.arange(0, COUNT).to(tl.uint32)) ^ salt) & 0xFFFF


@triton.jit
def stochastic(x, u, DTYPE: tl.constexpr):
    """`reference.stochastic`, through integers alone."""
    word = x.to(tl.uint32, bitcast=True)
    m = word & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        y = (word + u) >> 16  # the sign is the top bit, and no carry reaches it
        below_largest = m < 0x7F7F0000
    else:
        tiny = m < 0x38800000  # 2⁻¹⁴
        scaled = tl.where(tiny, tl.abs(x) * 1099511627776.0, 0.0).to(tl.int32).to(tl.uint32)
        normal = ((m + (u >> 3)) >> 13) - (112 << 10)
        y = tl.where(tiny, (scaled + u) >> 16, normal) | ((word >> 16) & 0x8000)
        below_largest = m < 0x477FE000  # 65504
    return tl.where(below_largest, y.to(tl.uint16).to(DTYPE, bitcast=True), round_to(x, DTYPE))


@triton.jit
def rounded(
    x, draw, offset, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr, IS_STOCHASTIC: tl.constexpr
):
    """fp32 of the elements from `offset` on as they are stored."""
    if IS_STOCHASTIC:
        y = stochastic(x, noise(draw, offset, x.shape[0]), INTERMEDIATE)
        if INTERMEDIATE != OUT:
            y = round_to(widen(y), OUT)
    else:
        y = round_twice(x, OUT, INTERMEDIATE)
    return y


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True) if x.dtype == tl.float32 else x.to(tl.int16, bitcast=True)


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
def unrounded(b, i, lam):
    """lerp32 of any sources at all, element by element."""
    scale, base_near, base_far = roles(lam)
    near = tl.where(base_near, widen(b), widen(i))
    far = tl.where(base_far, widen(b), widen(i))
    return tl.where(bits(near) == bits(far), near, tl.fma(far - near, scale, near))


@triton.jit
def keep_bits(w, b, i, lam, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr):
    """`w`, or the bits of a source where the contract says that they survive."""
    if INTERMEDIATE == OUT:
        if b.dtype == OUT and i.dtype == OUT:
            w = tl.where(bits(b) == bits(i), b, w)
        if b.dtype == OUT:
            w = tl.where(lam == 0.0, b, w)
        if i.dtype == OUT:
            w = tl.where(lam == 1.0, i, w)
    return w


@triton.jit
def lerp_of(b, i, lam, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr):
    """The contract for any sources at all, element by element, rounded to nearest."""
    w = round_twice(unrounded(b, i, lam), OUT, INTERMEDIATE)
    return keep_bits(w, b, i, lam, OUT, INTERMEDIATE)


@triton.jit
def dense_kernel(
    words,
    sizes,
    outs,
    bases,
    insts,
    lams,
    draws,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    offset = ((word & 0xFFFFFFFF) >> 1) * BLOCK
    lam = tl.load(lams + t)
    draw = tl.load(draws + t) if IS_STOCHASTIC else 0
    w_ptr = tl.load(outs + t).to(tl.pointer_type(OUT))
    b_ptr = tl.load(bases + t).to(tl.pointer_type(BASE))
    i_ptr = tl.load(insts + t).to(tl.pointer_type(INST))
    if word & 1:
        # whole, aligned and finite
        scale, base_near, base_far = roles(lam)
        offsets = tl.arange(0, BLOCK)
        if BASE == INST:
            near_ptr = tl.multiple_of(tl.where(base_near, b_ptr, i_ptr) + offset, 16)
            far_ptr = tl.multiple_of(tl.where(base_far, b_ptr, i_ptr) + offset, 16)
            near, far = widen(tl.load(near_ptr + offsets)), widen(tl.load(far_ptr + offsets))
        else:
            b = widen(tl.load(tl.multiple_of(b_ptr + offset, 16) + offsets))
            i = widen(tl.load(tl.multiple_of(i_ptr + offset, 16) + offsets))
            near, far = tl.where(base_near, b, i), tl.where(base_far, b, i)
        # of two equal forms the one whose weight is never positive: then a difference of +0 adds
        # −0, which changes nothing, and where both sources are −0 so is the result
        out_ptr = tl.multiple_of(w_ptr + offset, 16) + offsets
        if scale < 0:
            x = tl.fma(far - near, scale, near)
            tl.store(out_ptr, rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC))
        else:
            x = tl.fma(near - far, scale * -1.0, near)
            tl.store(out_ptr, rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC))
    else:
        end = tl.minimum(tl.load(sizes + t), offset + BLOCK)
        while offset < end:
            offsets = offset + tl.arange(0, TAIL)
            mask = offsets < end
            b = tl.load(b_ptr + offsets, mask=mask)
            i = tl.load(i_ptr + offsets, mask=mask)
            x = unrounded(b, i, lam)
            w = rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC)
            w = keep_bits(w, b, i, lam, OUT, INTERMEDIATE)
            tl.store(w_ptr + offsets, w, mask=mask)
            offset += TAIL


def launch_for(dtypes: Sequence[torch.dtype]) -> Launch:
    """The launch for operands of these dtypes."""
    return NARROW if len(set(dtypes)) == 1 and dtypes[0].itemsize == 2 else WIDE


def dtype_constants(
    names: Sequence[str], dtypes: Sequence[torch.dtype], intermediate_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Constexpr arguments `names` of these dtypes, the live tensor's first, and INTERMEDIATE."""
    constants = {name: TRITON_DTYPES[dtype] for name, dtype in zip(names, dtypes)}
    return constants | {"INTERMEDIATE": TRITON_DTYPES[intermediate_dtype or dtypes[0]]}


def constants(
    dtypes: Sequence[torch.dtype],
    intermediate_dtype: torch.dtype | None,
    is_stochastic: bool,
    launch: Launch,
) -> dict[str, Any]:
    """The constexpr arguments of `dense_kernel`. TAIL is two elements a thread, so that tails do
    not set the register count."""
    return {
        **dtype_constants(("OUT", "BASE", "INST"), dtypes, intermediate_dtype),
        "IS_STOCHASTIC": is_stochastic,
        "BLOCK": launch.block,
        "TAIL": 2 * launch.threads,
    }


class DenseTritonGroup(TritonGroup[SwitchRow]):
    """Tensors of one (out, base, inst, intermediate) dtype tuple and one kind of rounding on one
    device, ready to be launched for any λ.

    Attributes:
        draws: int64 [T] on the device, start / DRAW_STEP << 32 | key of each tensor's noise; None
            where rounding is to nearest.
    """

    kernel = dense_kernel

    def __init__(
        self, entries: Sequence[int], rows: Sequence[SwitchRow], launch: Launch | None = None
    ):
        super().__init__(entries, rows)
        first, is_stochastic = rows[0], rows[0].draw is not None
        self.launch = launch or launch_for(first.dtypes)
        self.constants = constants(
            first.dtypes, first.intermediate_dtype, is_stochastic, self.launch
        )
        self.draws: Tensor | None = None
        if is_stochastic:
            words = [row.draw.start // DRAW_STEP << 32 | row.draw.key for row in rows if row.draw]
            self.draws = tiles.table(words, self.device)
        totals = [
            source.sum(dtype=torch.float32).to(self.device)
            for row in rows
            for source in row.operands[1:]
        ]
        finite = torch.stack(totals).isfinite().view(-1, 2).all(dim=1).tolist()
        self.cut([row.out.numel() for row in rows], self.launch.block, finite)

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.lams, self.draws

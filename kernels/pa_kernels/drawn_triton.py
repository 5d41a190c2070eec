"""The dense lerp with stochastic rounding: `lerp_triton` whose first rounding adds noise that
belongs to the element."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import lerp_triton
from pa_kernels.checksum_triton import mix
from pa_kernels.lerp_triton import (
    full_blend,
    keep_bits,
    roles,
    round_to,
    round_via,
    unrounded,
    widen,
)
from pa_kernels.reference import DRAW_STEP, Draw
from pa_kernels.tiles import Launch


@triton.jit
def noise(draw, offset, COUNT: tl.constexpr):
    """`reference.noise` of COUNT elements from `offset` on, among which no index crosses 2³²;
    `draw` as in `Group`."""
    first = ((draw >> 32) << 16) + offset
    salt = mix((first >> 32).to(tl.uint32) ^ draw.to(tl.uint32))
    return mix((first.to(tl.uint32) + tl.arange(0, COUNT).to(tl.uint32)) ^ salt) & 0xFFFF


@triton.jit
def stochastic(x, u, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """`reference.stochastic`, through integers alone."""
    word = x.to(tl.uint32, bitcast=True)
    m = word & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        y = (word + u) >> 16  # the sign is the top bit, and no carry reaches it
        inside = m < 0x7F7F0000
    else:
        tiny = m < 0x38800000  # 2⁻¹⁴
        below = (
            tl.where(tiny, tl.abs(x) * 1099511627776.0, 0.0).to(tl.int32).to(tl.uint32) + u
        ) >> 16
        y = tl.where(tiny, below, ((m + (u >> 3)) >> 13) - (112 << 10)) | ((word >> 16) & 0x8000)
        inside = m < 0x477FE000  # 65504
    return tl.where(inside, y.to(tl.uint16).to(DTYPE, bitcast=True), round_to(x, DTYPE, INTERPRET))


@triton.jit
def full_tile(
    w_ptr,
    b_ptr,
    i_ptr,
    draw,
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
    w = stochastic(x, noise(draw, offset, BLOCK), VIA, INTERPRET)
    if VIA != OUT:
        w = round_via(widen(w, INTERPRET), OUT, OUT, INTERPRET)
    tl.store(tl.multiple_of(w_ptr.to(tl.pointer_type(OUT)), 16) + lanes, w)


@triton.jit
def drawn_kernel(
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
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    offset = ((word & 0xFFFFFFFF) >> 1) * BLOCK
    lam, draw = tl.load(lams + t), tl.load(draws + t)
    w_ptr, b_ptr, i_ptr = tl.load(outs + t), tl.load(bases + t), tl.load(insts + t)
    scale, base_near, base_far = roles(lam)
    if word & 1:
        if scale < 0:
            full_tile(
                w_ptr,
                b_ptr,
                i_ptr,
                draw,
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
                draw,
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
            w = stochastic(
                unrounded(b, i, lam, INTERPRET), noise(draw, offset, TAIL), VIA, INTERPRET
            )
            if VIA != OUT:
                w = round_via(widen(w, INTERPRET), OUT, OUT, INTERPRET)
            w = keep_bits(w, b, i, lam, OUT, BASE, INST, VIA)
            tl.store(w_ptr.to(tl.pointer_type(OUT)) + lanes, w, mask=inside)
            offset += TAIL


class Group(lerp_triton.Group):
    """Tensors of one (out, base, inst, via) dtype tuple on one device, rounded stochastically.

    Attributes:
        draws: int64 [T] on the device, start / DRAW_STEP << 32 | key of each tensor's noise.
    """

    kernel = drawn_kernel

    def __init__(
        self,
        entries: Sequence[int],
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        inst: Sequence[Tensor],
        via: torch.dtype | None,
        draws: Sequence[Draw],
        launch: Launch | None = None,
    ):
        super().__init__(entries, out, base, inst, via, launch)
        words = [draw.start // DRAW_STEP << 32 | draw.key for draw in draws]
        self.draws = torch.tensor(words, dtype=torch.int64, device="cpu").to(self.device)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return (self.lams, self.draws)

"""Stochastic rounding on the CPU: `reference.noise` and `reference.stochastic` in int32, a piece at a time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.reference import Draw

_SPAN = 1 << 32


def noise(draw: Draw, count: int) -> Tensor:
    """u of `count` elements, int32; scratch of twice its size."""
    left = _SPAN - draw.start % _SPAN
    if count > left:
        return torch.cat([noise(draw, left), noise(Draw(draw.key, draw.start + left), count - left)])
    key = int(reference.mix(torch.tensor((draw.start >> 32) ^ draw.key)))
    # int32 sums and products wrap, which is the modulus; a shift must not carry the sign along
    x = torch.add(_places(count), _signed(draw.start % _SPAN)).bitwise_xor_(_signed(key))
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(0xFFFFFFFF >> shift)).mul_(_signed(factor))
    torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_xor_(shifted).bitwise_and_(0xFFFF)


def stochastic(x: Tensor, draw: Draw, dtype: torch.dtype) -> Tensor:
    """`reference.stochastic` of a flat fp32 CPU tensor with the noise of `draw`; scratch of three times its size."""
    if dtype == torch.float32 or not x.numel():
        return x.to(dtype)
    m = x.view(torch.int32) & 0x7FFFFFFF
    limit = int(torch.tensor(torch.finfo(dtype).max, dtype=torch.float32, device="cpu").view(torch.int32))
    u = noise(draw, x.numel())
    if int(m.amax()) >= limit:
        return reference.stochastic(x, u.long(), dtype)
    if dtype == torch.bfloat16:
        # the sign is the top bit, and no carry reaches it
        return u.add_(x.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(dtype)
    small = m < 0x38800000  # 2⁻¹⁴
    below = torch.where(small, x.abs() * 2.0**40, 0.0).to(torch.int32).add_(u).bitwise_right_shift_(16)
    made = u.bitwise_right_shift_(3).add_(m).bitwise_right_shift_(13).sub_(112 << 10)
    sign = x.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0x8000)
    return torch.where(small, below, made).bitwise_or_(sign).to(torch.int16).view(dtype)


def _signed(word: int) -> int:
    return word - _SPAN if word >> 31 else word


@functools.lru_cache(maxsize=4)
def _places(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device="cpu")

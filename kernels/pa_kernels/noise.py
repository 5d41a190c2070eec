"""Stochastic rounding on the CPU: `reference.noise` and `reference.stochastic` in int32, a piece at
a time.

Every step is one operation of torch over scratch that its thread keeps: fresh memory for each would
cost more than the steps.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.cores import Scratch
from pa_kernels.reference import Draw

_SPAN = 1 << 32
_TINY = 0x38800000  # bits of 2⁻¹⁴

_scratch = Scratch()


def noise_(out: Tensor, draw: Draw, shifted: Tensor) -> None:
    """Write u of the elements of a piece into `out`; both tensors are int32 of its size."""
    before = _SPAN - draw.start % _SPAN
    if out.numel() > before:
        noise_(out[:before], draw, shifted[:before])
        noise_(out[before:], Draw(draw.key, draw.start + before), shifted[before:])
        return
    key = int(reference.mix(torch.tensor((draw.start >> 32) ^ draw.key)))
    # int32 sums and products wrap, which is the modulus; a shift must not carry the sign along
    torch.add(_places(out.numel()), _signed(draw.start % _SPAN), out=out).bitwise_xor_(_signed(key))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        torch.bitwise_right_shift(out, shift, out=shifted)
        out.bitwise_xor_(shifted.bitwise_and_(0xFFFFFFFF >> shift)).mul_(_signed(factor))
    torch.bitwise_right_shift(out, 16, out=shifted)
    out.bitwise_xor_(shifted).bitwise_and_(0xFFFF)


def stochastic_(out: Tensor, x: Tensor, draw: Draw) -> None:
    """Write `reference.stochastic` of fp32 x with the noise of `draw` into `out`, flat CPU tensors.

    Cost: about 20 passes over pieces that stay in cache; this thread's scratch of 4 times their
        size.
    """
    if out.dtype == torch.float32 or not x.numel():
        out.copy_(x)
        return
    word = x.view(torch.int32)
    u, m, spare, below = _scratch.take("rows", 4 * x.numel(), torch.int32).view(4, -1)
    noise_(u, draw, spare)
    torch.bitwise_and(word, 0x7FFFFFFF, out=m)
    if int(m.amax()) >= _limit(out.dtype):
        out.copy_(reference.stochastic(x, u.long(), out.dtype))
        return
    target = out.view(torch.int16)
    if out.dtype == torch.bfloat16:
        # the sign is the top bit, and no carry reaches it
        target.copy_(u.add_(word).bitwise_right_shift_(16))
        return
    scaled = torch.mul(m.view(torch.float32), 2.0**40, out=spare.view(torch.float32)).clamp_(
        max=2.0**26
    )
    below.copy_(scaled).add_(u).bitwise_right_shift_(16)
    normal = u.bitwise_right_shift_(3).add_(m).bitwise_right_shift_(13).sub_(112 << 10)
    # all bits where m < 2⁻¹⁴: a choice by arithmetic, which torch.where makes many times slower
    tiny = m.sub_(_TINY).bitwise_right_shift_(31)
    normal.bitwise_xor_(below.bitwise_xor_(normal).bitwise_and_(tiny))
    sign = torch.bitwise_right_shift(word, 16, out=spare).bitwise_and_(0x8000)
    target.copy_(normal.bitwise_or_(sign))


def _signed(word: int) -> int:
    return word - _SPAN if word >> 31 else word


@functools.cache
def _limit(dtype: torch.dtype) -> int:
    return int(
        torch.tensor(torch.finfo(dtype).max, dtype=torch.float32, device="cpu").view(torch.int32)
    )


@functools.lru_cache(maxsize=4)
def _places(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32, device="cpu")

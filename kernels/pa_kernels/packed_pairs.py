"""The pair behind a packed weight: from what holds W(λ), and its code, to the patterns of base and
target."""

from __future__ import annotations

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.reference import MANTISSA


def sources(
    w: Tensor, codes: Tensor, above: Tensor, dtype: torch.dtype, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns of base and target of what holds W(λ) in patterns w, of equal ones w itself, of
    exceptions anything; and −1 where they differ, else 0.

    In one binade W is as many units above the lower of the two as `above`, its `table`, says,
    whatever the exponent. A code does not say whether its weight is of that kind: it is not if what
    lies so far below W has the wrong parity, or does not share its binade with the upper one; then
    the lower one is solved for.
    """
    k = codes >> 1
    n = k.abs()
    moves = (k | -k) >> 15
    low = w - torch.index_select(above, 0, codes.int() + above.numel() // 2)
    odd = ((low ^ (low + n)) & (-1 << MANTISSA[dtype])) | ((low ^ codes) & 1)
    at = (odd & moves).nonzero().view(-1)
    if at.numel():
        low[at] = solved(w[at], codes[at], dtype, lam)
    b = low + (n & (k >> 15))  # the upper one where k is negative
    return b, b + k, moves


def table(width: int, dtype: torch.dtype, lam: float) -> Tensor:
    """bits(W(λ)) less the lower pattern, for pairs that share a binade, by code from the least to
    the largest: int16 [2^width].

    fp32 keeps 24 bits of a sum whose leading one stands where the dtype's does, so it rounds
    multiples of λ to a fixed fraction of a unit, and which way a tie of the last rounding goes is a
    matter of the one parity bit.
    """
    codes = torch.arange(-(1 << (width - 1)), 1 << (width - 1), dtype=torch.int32, device="cpu")
    k, p = (codes >> 1).double(), (codes & 1).double()
    fraction = 2.0 ** (23 - MANTISSA[dtype])
    near_base = abs(lam) < 0.5
    weight = lam if near_base else reference.fp32(lam - 1)
    # base is k⁻ units above the lower one, target k⁺
    above = (-k if near_base else k).clamp(min=0) + torch.round(weight * k * fraction) / fraction
    return (torch.round(p + above) - p).clamp(-32768, 32767).to(torch.int16)


def solved(w: Tensor, codes: Tensor, dtype: torch.dtype, lam: float) -> Tensor:
    """The lower patterns of weights whose pairs lie across binades, by the inverse of f in
    `packed_reference.packed_sources`.

    f is linear between powers of two of either side, and f(2L) = 2·f(L). So: scale W until L is in
    [1, 2) (in units of its last place [2ʰ, 2ʰ⁺¹)), choose between the two places that the upper
    one's power of two can have, solve, and take the nearest number of the right parity. W being
    rounded moves the solution by less than one, by 1/2ʰ⁺¹ at least less, which is why it is
    nearest: doubles are far more exact than that.
    """
    h = MANTISSA[dtype]
    one = 1 << h
    # fp32 is exact enough for bf16
    wide, whole, bits, bias = (
        (torch.float32, torch.int32, 23, 127) if h == 7 else (torch.float64, torch.int64, 52, 1023)
    )

    def power(exponent: Tensor) -> Tensor:
        return ((exponent + bias) << bits).view(wide)

    codes = codes.to(whole)
    magnitude, n, p = w.to(whole) & 0x7FFF, (codes >> 1).abs(), (codes & 1).to(wide)
    up, down = torch.tensor([lam, 1.0 - lam], dtype=wide, device=w.device)
    rising = codes >= 0
    # the weights of either
    upper, lower = (
        torch.where(rising, up, down),
        torch.where(rising, down, up),
    )
    grown, j = upper * power(n >> h), (n & (one - 1)).to(wide)
    significand = ((magnitude & (one - 1)) + one).to(wide)
    least = grown * (j + one) + lower * one  # f of the power of two itself
    shift = ((significand / least).view(whole) >> bits) - bias
    y = significand * power(-shift)
    # where the upper one is beyond a power of two more than the lower one, its units are twice as
    # large
    crosses = y >= lower * (2 * one - j) + 2 * one * grown
    units = torch.where(crosses, 2 * grown, grown)
    origin = units * j + lower * one + torch.where(crosses, 0, grown * one)
    steps = 2 * torch.round(((y - origin) / (lower + units) - p) / 2) + p
    solved = (((magnitude >> h) + shift) << h) + steps.nan_to_num(0).clamp(-32768, 32767).to(whole)
    return solved.clamp(0, 32767).to(torch.int16) | (w & -32768)

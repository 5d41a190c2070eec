"""The specification of packed deltas in plain torch: the codes, and why W(λ), λ and a code leave
one pair; see `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from pa_kernels.reference import LIMIT, MANTISSA, fp32, lerp


def packed_codes(
    base: Tensor, inst: Tensor, width: int, span: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """The code of every weight, and where there is none: what of a delta has to be known beside
    live weights.

    With k = bits(inst) − bits(base), both weights of one sign, the code is 2·k + p, p being the
    lowest bit of the lower of the two patterns. Coded are finite weights whose patterns are equal,
    and those of one sign, both normal, with |k| up to LIMIT[width]; where `span` leaves [0, 1], of
    the latter only those with base, inst, W(lo) and W(hi) in one binade and no merge under the
    smallest normal number before it is rounded.

    Args:
        base, inst: of one shape and one dtype, bf16 or fp16.
        width: 8 or 16, the bits of a code.
        span: the λ, from lo to hi, that the codes are for; 0 and 1 are among them.

    Returns:
        int16 codes, 0 where there is none; bool, true there.

    Numerics: exact integers. `packed_sources` says why this is enough.
    """
    dtype = base.dtype
    b, i = base.view(torch.int16).int(), inst.view(torch.int16).int()
    k = i - b
    coded = (b ^ i >= 0) & (k.abs() <= LIMIT[width]) & _normal(b, dtype) & _normal(i, dtype)
    if not 0 <= span[0] <= span[1] <= 1:
        binade = b >> MANTISSA[dtype]
        coded &= i >> MANTISSA[dtype] == binade
        for lam in span:
            coded &= lerp(base, inst, lam).view(torch.int16).int() >> MANTISSA[dtype] == binade
            coded &= (
                lerp(base, inst, lam, torch.float32).abs() >= torch.finfo(dtype).smallest_normal
            )
    coded |= (k == 0) & ((b & 0x7FFF) <= largest(dtype))
    lower = torch.where(k < 0, i, b)
    return torch.where(coded, 2 * k + (lower & 1), 0).to(torch.int16), ~coded


def packed_sources(live: Tensor, codes: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Base and inst of coded weights that hold W(λ): the one pair that the code, λ and the live
    bits leave possible.

    Args:
        live: W(λ), bf16 or fp16.
        codes: int16 in its shape, see `packed_codes`.
        lam: λ that `live` holds; outside [0, 1] the codes must be for that.

    Numerics:
        Let L be the lower and U = L + |k| the upper pattern of a pair, and μ the weight of U: λ
        where k > 0, else 1 − λ. Within [0, 1], f(L) = (1 − μ)·val(L) + μ·val(L + |k|) grows with L,
        and by at least f(L)/256 with each step: a normal number with h bits below its leading one
        is at most 2ʰ⁺¹ units of its last place, and h is 7 or more (of fp16 10; then read 2048). So
        two L of one parity are more than f/128 apart, while all f that round to one W lie within
        one unit of its last place, at most W/128; where W is a power of two they lie within ¾ of
        that, and else f exceeds the power below it by half a unit, which is what `more` leaves
        over. The roundings in fp32 move f by 2⁻²³ of itself and change nothing. Hence at most one L
        of the given parity rounds to W, binade boundaries between L and U or not, and bisection
        over that parity finds it.

        Outside [0, 1] base, inst and W share a binade [2ᵉ, 2ᵉ⁺¹) by promise, in which f has equal
        steps. W is monotone in λ, so it is enough to ask this of W(lo) and W(hi). A merge that
        rounds up to 2ᵉ⁺¹ breaks it visibly. One that lies under 2ᵉ and rounds up to it does not,
        and need not: the grid under 2ᵉ is twice as fine, so it lies within a quarter of a unit, and
        the steps of the binade take it to 2ᵉ too. But under the smallest normal number the grid is
        as coarse as over it, and a merge rounds up from half a unit: scaled to another exponent, as
        `packed_look_up.Way` scales, it would not. So there is no code where a merge lies under the
        smallest normal number. A code k = 0 says that base and inst are W.
    """
    dtype, h = live.dtype, MANTISSA[live.dtype]
    w, k, p = live.view(torch.int16).int() & 0x7FFF, codes.int() >> 1, codes.int() & 1
    n = k.abs()
    first, last = torch.full_like(w, 1 << h), torch.full_like(w, largest(dtype))
    if not 0 <= fp32(lam) <= 1:
        first, last = w >> h << h, (w >> h << h) + (1 << h) - 1
    # least half x with W(2x + p) ≥ w
    low, high = (first - p + 1) >> 1, (last - n - p) >> 1

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        lower = 2 * x + p
        sides = torch.where(k < 0, lower + n, lower), torch.where(k < 0, lower, lower + n)
        return tuple(side.to(torch.int16).view(dtype) for side in sides)  # type: ignore[return-value]

    while bool((low < high).any()):
        middle = (low + high) >> 1
        reached = lerp(*pair(middle), lam).view(torch.int16).int() >= w
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    sign = live.view(torch.int16) & -0x8000
    found = (
        torch.where(k == 0, live.view(torch.int16), side.view(torch.int16) | sign)
        for side in pair(low)
    )
    b, i = (side.view(dtype) for side in found)
    return b, i


def packed_switch(live: Tensor, codes: Tensor, old: float, new: float) -> Tensor:
    """W(new) of coded weights that hold W(old)."""
    return lerp(*packed_sources(live, codes, old), new)


def _normal(bits: Tensor, dtype: torch.dtype) -> Tensor:
    magnitude = bits & 0x7FFF
    return (magnitude >> MANTISSA[dtype] > 0) & (magnitude <= largest(dtype))


def largest(dtype: torch.dtype) -> int:
    """The pattern of the largest finite number."""
    return 0x7F7F if dtype == torch.bfloat16 else 0x7BFF

"""What can be added up over the weights of a pair: norms, counts and a histogram, chunk by chunk in
any order.

k is the distance of two weights of one sign on the grid of the live dtype: the difference of their
bit patterns as integers, so |k| = 1 means neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.fidelity import Merge, Moved, fidelity
from pa_fast.checkpoint.recipe import Blend
from pa_fast.checkpoint.streaming import merge_chunk_

if TYPE_CHECKING:
    import torch

BUCKETS = 33
"""|k| = 0 is bucket 0, and 2^(n−1) ≤ |k| < 2^n is bucket n: up to 16 of bf16 and fp16, 32 of
fp32."""
SMALL_CODE, LARGE_CODE = 63, 8191
"""The largest |k| of the 8-bit and of the 16-bit codes of a packed store."""


@dataclass(frozen=True)
class DeltaSums:
    """Sums over `weights` elements of a pair.

    Attributes:
        base_square, delta_square: ‖B‖² and ‖I − B‖².
        unchanged: elements with equal values and signs on both sides.
        sign_crossings, binade_crossings: elements whose sign, or exponent, differs at the live
            dtype.
        histogram: elements of equal sign by |k|; see `BUCKETS`.
        no_small_code, no_large_code: elements that 8-bit, or 16-bit, codes of a packed store cannot
            stand for.
        inexact: elements that the live dtype cannot hold exactly on some side.
        moved: for each λ of a grid.
    """

    weights: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    unchanged: int = 0
    sign_crossings: int = 0
    binade_crossings: int = 0
    no_small_code: int = 0
    no_large_code: int = 0
    inexact: int = 0
    histogram: tuple[int, ...] = (0,) * BUCKETS
    moved: tuple[Moved, ...] = ()

    def __add__(self, other: DeltaSums) -> DeltaSums:
        pairs = [
            (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        ]
        return DeltaSums(*(_added(a, b) for a, b in pairs))

    def scaled(self, weights: int) -> DeltaSums:
        """These sums as an estimate over `weights` elements, of which they are a sample; itself
        where they are all."""
        if weights == self.weights or not self.weights:
            return self
        share = weights / self.weights
        return DeltaSums(
            *(_scaled(getattr(self, field.name), share) for field in dataclasses.fields(self))
        )


def _scaled(value: Any, share: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(one, share) for one in value)
    if isinstance(value, Moved):
        return Moved(value.along * share, round(value.weights * share))
    return round(value * share) if isinstance(value, int) else value * share


def _added(a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(x + y for x, y in zip(a, b)) if a and b else a or b
    return a + b


def delta_sums(
    base: torch.Tensor,
    instruct: torch.Tensor,
    dtype: torch.dtype,
    blends: Sequence[Blend] = (),
    merge: Merge = merge_chunk_,
) -> DeltaSums:
    """The sums of flat tensors [N], bf16, fp16 or fp32, that are held in `dtype`, and `fidelity` of
    each of `blends`.

    Numerics: fp32 dot products: call it on pieces of about a million, and add.
    Cost: about thirty passes over scratch of the size of the piece in fp32, and three per λ.
    """
    import torch

    wide_b, wide_i = base.float(), instruct.float()
    delta = wide_i - wide_b
    live_b, live_i = base.to(dtype), instruct.to(dtype)
    kind, low, exponents, unsigned = {
        torch.bfloat16: (torch.int16, 7, 0x7F80, 0x7FFF),
        torch.float16: (torch.int16, 10, 0x7C00, 0x7FFF),
        torch.float32: (torch.int32, 23, 0x7F800000, 0x7FFFFFFF),
    }[dtype]
    bits_b, bits_i = live_b.view(kind), live_i.view(kind)
    differing = bits_b ^ bits_i
    crossed = differing < 0
    wider = torch.int64 if kind == torch.int32 else torch.int32
    distance = (bits_i.to(wider) - bits_b.to(wider)).abs_()
    sizes = bits_b & unsigned, bits_i & unsigned
    normal = (torch.minimum(*sizes) >= 1 << low) & (torch.maximum(*sizes) < exponents)
    coded = normal.logical_or_(distance == 0) & ~crossed
    inexact = 0
    if not base.dtype == instruct.dtype == dtype:
        inexact = _count((live_b.float() != wide_b) | (live_i.float() != wide_i))
    return DeltaSums(
        weights=base.numel(),
        base_square=float(torch.dot(wide_b, wide_b)),
        delta_square=float(torch.dot(delta, delta)),
        unchanged=_count(wide_b.view(torch.int32) == wide_i.view(torch.int32)),
        sign_crossings=_count(crossed),
        binade_crossings=_count(differing & exponents),
        no_small_code=base.numel() - _count(coded & (distance <= SMALL_CODE)),
        no_large_code=base.numel() - _count(coded & (distance <= LARGE_CODE)),
        inexact=inexact,
        histogram=_histogram(distance, crossed),
        moved=tuple(fidelity(base, instruct, blends, dtype, merge)) if blends else (),
    )


def _count(flags: torch.Tensor) -> int:
    import torch

    return int(torch.count_nonzero(flags))  # `sum` would first make int64 of them


def _histogram(distance: torch.Tensor, left_out: torch.Tensor) -> tuple[int, ...]:
    """How many of int32 or int64 [N] numbers have each number of binary digits, those `left_out`
    apart."""
    import torch

    # the exponent of a float is the number of digits: int32 ones have 16 at most, which fp32 holds
    # exactly
    if distance.dtype == torch.int64:
        digits = (distance.double().view(torch.int64) >> 52) - 1022
    else:
        digits = (distance.float().view(torch.int32) >> 23) - 126
    digits.clamp_min_(0).masked_fill_(left_out, BUCKETS)
    return tuple(torch.bincount(digits, minlength=BUCKETS + 1)[:BUCKETS].tolist())

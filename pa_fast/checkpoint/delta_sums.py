"""What can be added up over the weights of a pair: norms, counts and a histogram, chunk by chunk in any order.

k is the distance of two weights of one sign on the grid of the live dtype: the difference of their bit patterns as
integers, so |k| = 1 means neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.fidelity import Moved, fidelity

if TYPE_CHECKING:
    import torch

BUCKETS = 33
"""|k| = 0 is bucket 0, and 2^(n−1) ≤ |k| < 2^n is bucket n: up to 16 of bf16 and fp16, 32 of fp32."""
SMALL_CODE, LARGE_CODE = 63, 16383
"""The largest |k| of the 8-bit and of the 16-bit codes of a packed store."""


@dataclass(frozen=True)
class DeltaSums:
    """Sums over `weights` elements of a pair.

    Attributes:
        base_square, delta_square: ‖B‖² and ‖I − B‖².
        unchanged: elements with equal values and signs on both sides.
        sign_crossings, binade_crossings: elements whose sign, or exponent, differs at the live dtype.
        histogram: elements of equal sign by |k|; see `BUCKETS`.
        no_small_code, no_large_code: elements that 8-bit, or 16-bit, codes of a packed store cannot stand for.
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
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)]
        return DeltaSums(*(_added(a, b) for a, b in pairs))

    def scaled(self, weights: int) -> DeltaSums:
        """These sums as an estimate over `weights` elements, of which they are a sample; itself where they are all."""
        if weights == self.weights or not self.weights:
            return self
        share = weights / self.weights
        return DeltaSums(*(_scaled(getattr(self, field.name), share) for field in dataclasses.fields(self)))


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


def delta_sums(base: torch.Tensor, instruct: torch.Tensor, dtype: torch.dtype, lams: Sequence[float] = ()) -> DeltaSums:
    """The sums of flat tensors [N], bf16, fp16 or fp32, that are held in `dtype`, and `fidelity` at each of `lams`.

    Numerics: fp32 dot products: call it on pieces of about a million, and add.
    Cost: about thirty passes over scratch of the size of the piece in fp32, and three per λ.
    """
    import torch

    wide_b, wide_i = base.float(), instruct.float()
    delta = wide_i - wide_b
    live_b, live_i = base.to(dtype), instruct.to(dtype)
    kind, exponent = (torch.int32, 0xFF) if dtype.itemsize == 4 else (torch.int16, 0xFF if dtype == torch.bfloat16 else 0x1F)
    low = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    bits_b, bits_i = live_b.view(kind), live_i.view(kind)
    crossed = (bits_b ^ bits_i) < 0
    exponents = (bits_b >> low) & exponent, (bits_i >> low) & exponent
    wider = torch.int64 if kind == torch.int32 else torch.int32
    distance = (bits_i.to(wider) - bits_b.to(wider)).abs_()
    normal = (exponents[0] != 0) & (exponents[1] != 0) & (exponents[0] != exponent) & (exponents[1] != exponent)
    coded = ~crossed & (normal | (distance == 0))
    inexact = 0
    if not base.dtype == instruct.dtype == dtype:
        inexact = int(((live_b.float() != wide_b) | (live_i.float() != wide_i)).sum())
    return DeltaSums(
        weights=base.numel(),
        base_square=float(torch.dot(wide_b, wide_b)),
        delta_square=float(torch.dot(delta, delta)),
        unchanged=int((wide_b.view(torch.int32) == wide_i.view(torch.int32)).sum()),
        sign_crossings=int(crossed.sum()),
        binade_crossings=int((exponents[0] != exponents[1]).sum()),
        no_small_code=base.numel() - int((coded & (distance <= SMALL_CODE)).sum()),
        no_large_code=base.numel() - int((coded & (distance <= LARGE_CODE)).sum()),
        inexact=inexact,
        histogram=_histogram(distance[~crossed]),
        moved=tuple(fidelity(base, instruct, lams, dtype)) if lams else (),
    )


def _histogram(distance: torch.Tensor) -> tuple[int, ...]:
    """How many of int32 or int64 [P] numbers have each number of binary digits."""
    import torch

    exact = distance.double() if distance.dtype == torch.int64 else distance.float()  # int32 ones have 16 digits at most
    digits = torch.frexp(exact).exponent  # 0 has exponent 0, 2^(n−1) to 2^n − 1 have n
    return tuple(torch.bincount(digits, minlength=BUCKETS).tolist())

"""What a packed delta keeps: for every weight the code from which W(λ′) follows W(λ), and nothing
of the base beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pa_kernels
import torch
from pa_kernels import PackedTensor
from pa_kernels.reference import MANTISSA, same_bits
from torch import Tensor

from pa_fast.delta.entry import Entry, Source, Whole
from pa_fast.errors import DataError, UsageError


@dataclass(frozen=True)
class PackedStore:
    """Codes of 8 or 16 bits for each tensor, whichever take fewer bytes; a tensor that would cost
    more so is held whole.

    Whole is also what does not fit the codes: tensors of fp32, sides that the live dtype does not
    hold exactly, and merges that are rounded to another dtype first.

    Args:
        lo, hi: the λ that it is for, [0, 1] among them. Wider ones cost: past [0, 1] a code stands
            only for weights that stay in one power of two all the way, the others are kept with
            both their values.

    Numerics: bit for bit the contract between base and instruct, within the range; no switch rounds
    anything away.
    Cost: 1 to 1.5 bytes per bf16 weight where I − B is up to 4 % of the weights, 2.5 at 23 %,
        beside the live 2. Encoding reads the sources once or twice and proves each tensor by two
        switches, and two more where the range is wider than [0, 1]; scratch for two copies of the
        largest.

    Raises:
        UsageError: the range leaves out 0 or 1, or is not finite.
    """

    lo: float = 0.0
    hi: float = 1.0

    name = "packed"
    exact = True
    lossless = True

    def __post_init__(self) -> None:
        if not (-1e6 <= self.lo <= 0.0 and 1.0 <= self.hi <= 1e6):
            raise UsageError(
                f"range {self.lo:g}:{self.hi:g}",
                "give the least and the largest λ, around 0 and 1, such as -0.2:1.5",
            )

    def describe(self) -> str:
        """All options in one line."""
        return (
            self.name
            if (self.lo, self.hi) == (0.0, 1.0)
            else f"{self.name}, λ from {self.lo:g} to {self.hi:g}"
        )

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entry of each source, in order and one at a time.

        Raises:
            DataError: codes do not give back what they were made of.
        """
        for source in sources:
            base, instruct = source.there()
            yield self._packed(source, base, instruct) or Whole(instruct)

    def _packed(self, source: Source, base: Tensor, instruct: Tensor) -> PackedTensor | None:
        if source.dtype not in MANTISSA or source.via not in (None, source.dtype):
            return None
        sides = [_exactly(side, source.dtype) for side in (base, instruct)]
        if any(side is None for side in sides):
            return None
        b, i = (side.reshape(-1) for side in sides if side is not None)
        entry = PackedTensor.encode(b, i, (self.lo, self.hi))
        if entry is None or entry.nbytes >= base.nbytes + instruct.nbytes:
            return None
        _prove(source.name, entry, b, i)
        return entry


def _exactly(side: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`side` in `dtype`, or None if that would change it."""
    if side.dtype == dtype:
        return side
    narrowed = side.to(dtype)
    return narrowed if bool(same_bits(narrowed.to(side.dtype), side).all()) else None


def _prove(name: str, entry: PackedTensor, base: Tensor, instruct: Tensor) -> None:
    """Switch a copy of the base to λ = 1, to the ends of the range and back, as live weights will,
    and compare bit for bit."""
    live = base.clone()
    packed = pa_kernels.Packed([live], [entry])
    packed.holds(0.0)
    for lam in (1.0, *(lam for lam in entry.range if lam not in (0.0, 1.0)), 0.0):
        packed.run_(lam)
        expected = torch.empty_like(base)
        pa_kernels.lerp_([expected], [base], [instruct], lam)
        differs = ~same_bits(live, expected)
        if lam not in (0.0, 1.0):
            differs &= ~(live.isnan() & expected.isnan())  # the contract leaves their payload open
        if packed.wrong() or bool(differs.any()):
            raise DataError(
                f"`{name}`: its codes do not give back the weights at λ = {lam:g}",
                "a bug or failing memory; use --store dense",
            )

"""λ fidelity: where on the line from B to I rounded weights really are.

    effective λ = ⟨W(λ) − B, I − B⟩ / ‖I − B‖²

The grid of a 16-bit dtype swallows updates under half a unit in the last place: with a delta of 2 %
of the weights, λ = 0.05 acts like 0.026.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_fast.checkpoint.recipe import Blend
from pa_fast.checkpoint.streaming import merge_chunk_

if TYPE_CHECKING:
    import torch

Merge = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", Blend], None]
"""`merge(out, base, instruct, blend)` writes W(λ) of flat tensors [N] into `out` [N], rounded to
its dtype."""


@dataclass(frozen=True)
class Moved:
    """Sums over some weights at one λ: `along` is ⟨W − B, I − B⟩, `weights` how many have other
    bits than at λ = 0."""

    along: float
    weights: int

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.along + other.along, self.weights + other.weights)


def fidelity(
    base: torch.Tensor,
    instruct: torch.Tensor,
    blends: Sequence[Blend],
    dtype: torch.dtype,
    merge: Merge = merge_chunk_,
) -> list[Moved]:
    """What each λ of a grid does to flat tensors [N] of one pair, held in `dtype`.

    Args:
        base, instruct: [N], bf16, fp16 or fp32, any mix.
        dtype: the live dtype, which W(λ) is rounded to.
        blends: the λ of each point, all with the same noise or none.
        merge: how W(λ) is computed and rounded; the contract by default, of tensors from their
            first element on.

    Numerics: W − B and I − B in fp32, dot products in fp32: call it on pieces of about a million,
    and add the sums.
    Cost: three passes per λ over scratch of 10 bytes per element.
    """
    import torch

    wide = base.float()
    delta = instruct.float() - wide
    out, start = torch.empty(base.numel(), dtype=dtype), base.to(dtype)
    if blends and blends[0].key is not None:
        start = torch.empty_like(out)
        merge(start, base, instruct, Blend(0.0, blends[0].key))
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    found = []
    for blend in blends:
        merge(out, base, instruct, blend)
        moved = int(torch.count_nonzero(out.view(kind) != start.view(kind)))
        found.append(Moved(float(torch.dot(out.float() - wide, delta)), moved))
    return found

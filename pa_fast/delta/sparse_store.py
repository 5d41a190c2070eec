"""What a sparse delta keeps: a selection of the weights, tensor by tensor, as positions and
values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pa_kernels.reference import rounded
from pa_kernels.sparse import TILE, SparseTensor, position_bytes
from torch import Tensor

from pa_fast.delta import selection
from pa_fast.delta.entry import Entry, Source, Whole
from pa_fast.errors import DataError, UsageError

SELECTIONS = {"exact": None, "topk": None, "ties": 0.2, "dare": None}
"""What can be selected, and the density that goes without saying."""

SCOPES = ("tensor", "global")


@dataclass(frozen=True)
class SparseStore:
    """A delta at positions only, and which those are. A tensor that would cost more so than whole
    is held whole.

    Args:
        select: `exact`: all weights that differ, so nothing is lost (for pairs that differ in few,
            as after RL or DPO); `topk`: the largest |I − B|; `ties`: the same for each tensor, a
            fifth unless told (TIES-merging's trim); `dare`: each differing weight with probability
            `density`, its difference divided by it.
        density: share of the weights that is kept, in (0, 1].
        scope: whether `topk` takes that share of each `tensor` or of all, `global`.
        seed: of `dare`: the draw belongs to (seed, name, place), whatever the order or the cutting
            of the work.

    Numerics: W(λ) is the contract between B and D, D being B where nothing is selected; ties of
    magnitude go by position.
    Cost: 3 reads of the sources for `topk` and `ties`, else 1; scratch of 2 bytes per weight of the
    largest tensor.
    Source: TIES: Yadav et al., arXiv 2306.01708. DARE: Yu et al., arXiv 2311.03099.

    Raises:
        UsageError: an option that does not exist, or that the selection does not take.
    """

    select: str = "exact"
    density: float | None = None
    scope: str = "tensor"
    seed: int = 0

    name = "sparse"
    exact = True

    def __post_init__(self) -> None:
        if self.select not in SELECTIONS:
            raise UsageError(
                f"selection `{self.select}` is not available", f"available: {', '.join(SELECTIONS)}"
            )
        if self.scope not in SCOPES or (self.scope == "global" and self.select != "topk"):
            raise UsageError(
                f"`{self.select}` has no scope `{self.scope}`",
                "topk takes tensor or global, the others neither",
            )
        if self.select == "exact" and self.density is not None:
            raise UsageError(
                f"density {self.density} with selection `exact`",
                "exact takes what differs: choose topk, ties, dare",
            )
        if self.select != "exact":
            share = SELECTIONS[self.select] if self.density is None else self.density
            if share is None or not 0 < share <= 1:
                said = "no density" if share is None else f"density {share}"
                raise UsageError(
                    f"`{self.select}` with {said}", "give the share of weights to keep, such as 0.1"
                )
            object.__setattr__(self, "density", float(share))
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed {self.seed}", "give a number from 0 to 4294967295")

    @property
    def lossless(self) -> bool:
        """Whether the delta's end is the instruct model."""
        return self.select == "exact"

    def describe(self) -> str:
        """All options in one line."""
        said = [f"{self.name} {self.select}"]
        if self.density is not None:
            said.append(
                f"density {self.density:g}" + (f" {self.scope}" if self.select == "topk" else "")
            )
        if self.select == "dare":
            said.append(f"seed {self.seed}")
        return ", ".join(said)

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entry of each source, in order and one at a time.

        Raises:
            DataError: a rescaled weight does not fit into the live dtype.
        """
        cut = self._cut(sources) if self.scope == "global" else None
        for source in sources:
            base, instruct = (tensor.reshape(-1) for tensor in source.there())
            if self.select == "exact":
                mask = selection.changed(base, instruct)
            elif self.select == "dare":
                mask = selection.drawn(source.name, base, instruct, self.density or 0, self.seed)
            elif cut is not None:
                mask, cut = selection.above(cut, base, instruct)
            else:
                mask, _ = selection.above(self._cut([source]), base, instruct)
            yield self._entry(source, mask, base, instruct)

    def _cut(self, sources: Sequence[Source]) -> selection.Cut:
        count = round((self.density or 0) * sum(source.base.numel() for source in sources))

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for source in sources:
                base, instruct = source.there()
                yield base.reshape(-1), instruct.reshape(-1)

        return selection.largest(pairs, count)

    def _entry(self, source: Source, mask: Tensor, base: Tensor, instruct: Tensor) -> Entry:
        count = int(mask.sum())
        value_bytes = (
            base.element_size()
            + (source.dtype if self.select == "dare" else instruct.dtype).itemsize
        )
        where_bytes = min(position_bytes(kind, base.numel(), count) for kind in TILE)
        if where_bytes + value_bytes * count < value_bytes * base.numel():
            start, end = base[mask], instruct[mask]
            return SparseTensor.encode(mask, start, self._target(source, start, end), base.numel())
        if self.lossless:
            return Whole(instruct.view(source.base.shape))
        values = self._target(source, base[mask], instruct[mask])
        # one dtype that holds both what moves and what stays
        dtype = base.dtype if base.dtype == values.dtype else torch.float32
        target = base.to(dtype, copy=True)
        target[mask] = values.to(dtype)
        return Whole(target.view(source.base.shape))

    def _target(self, source: Source, start: Tensor, end: Tensor) -> Tensor:
        if self.select != "dare":
            return end
        scaled = start.float() + (end.float() - start.float()) / (self.density or 1)
        target = rounded(scaled, source.dtype, source.via)
        lost = int((target.isinf() & ~end.isinf()).sum())
        if lost:
            raise DataError(
                f"`{source.name}`: {lost} weights rescaled by 1/{self.density:g} do not fit into"
                f" {source.dtype}",
                "choose a larger density, or a live dtype of a larger range",
            )
        return target

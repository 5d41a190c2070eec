"""What a low-rank delta keeps: the leading singular directions of I − B, matrix by matrix, and how
many of each."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pa_kernels.lowrank import RANK_STEP
from pa_kernels.svd import Truncated, factors, truncated_svd
from torch import Tensor

from pa_fast.delta.entry import Entry, Factors, Source, Whole
from pa_fast.errors import DataError, UsageError


@dataclass(frozen=True)
class LowRankStore:
    """I − B cut to a rank, for each matrix and for each matrix of a stack (experts). It is an
    approximation: the weights of a full fine-tune are not of low rank. All other tensors, and those
    that factors would make larger, are held whole.

    Args:
        rank: of every matrix; 64 where nothing is said.
        energy: instead: for each matrix the lowest rank that holds this share of ‖I − B‖², in (0,
            1].
        budget_bytes: instead: bytes of the whole delta. Ranks go to the matrix where a byte gains
            the most of ‖I − B‖².
        seed: of the random start of the decomposition.
        attached: leave the factors beside the weights of linear and embedding layers, λ a scalar of
            their forward pass (`pa_fast.load` alone can), instead of merging them.

    Ranks are multiples of 16, rounded up, which is what the matrix units of a GPU take at a time.

    Numerics: factors are U·√S and √S·V, rounded to the live dtype.
    Cost: a randomised decomposition of each matrix (`pa_kernels.svd`); for an energy one for each
        doubling of the rank; for a budget two, the first of the largest rank that it could pay for.

    Raises:
        UsageError: more than one of rank, energy and budget, or one that cannot be.
    """

    rank: int | None = None
    energy: float | None = None
    budget_bytes: int | None = None
    seed: int = 0
    attached: bool = False

    name = "lowrank"
    exact = False
    lossless = False

    def __post_init__(self) -> None:
        given = {"rank": self.rank, "energy": self.energy, "budget": self.budget_bytes}
        said = {name: value for name, value in given.items() if value is not None}
        if len(said) > 1:
            raise UsageError(
                f"{' and '.join(said)} are given together",
                "the rank follows from one of rank, energy, budget",
            )
        for name, value in said.items():
            if not value > 0 or (name == "energy" and value > 1):
                raise UsageError(
                    f"{name} {value}", "give a positive rank or size, or an energy in (0, 1]"
                )
        if not said:
            object.__setattr__(self, "rank", 64)

    def describe(self) -> str:
        """All options in one line."""
        if self.energy is not None:
            chosen = f"energy {self.energy:g}"
        else:
            chosen = (
                f"rank {self.rank}"
                if self.budget_bytes is None
                else f"budget {self.budget_bytes} bytes"
            )
        return f"{self.name}{' attached' if self.attached else ''}, {chosen}, seed {self.seed}"

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entry of each source, in order and one at a time.

        Raises:
            UsageError: the budget does not even hold the tensors that have no rank.
            DataError: a difference is not finite.
        """
        paid = None if self.budget_bytes is None else self._paid(sources, self.budget_bytes)
        for t, source in enumerate(sources):
            most, found = largest_rank(source), None
            if most and paid is not None:
                found = _decomposed(source, paid[t], self.seed)
            elif most and self.energy is not None:
                found = self._enough(source, most, self.energy)
            elif self.rank is not None and self.rank <= most:
                found = _decomposed(source, _stepped(self.rank), self.seed)
            yield Whole(source.instruct.to(source.device)) if found is None else found.factors()

    def _enough(self, source: Source, most: int, share: float) -> _Decomposition | None:
        """As many directions as hold `share` of the energy; None where they would cost more than
        the whole."""
        rank = 0
        while rank < most:
            rank = min(max(2 * rank, 2 * RANK_STEP), most)
            found = _decomposed(source, rank, self.seed)
            held = [0.0, *found.gains().cumsum(0).tolist()]
            enough = next((k for k, sum_ in enumerate(held) if sum_ >= share * found.energy), None)
            if enough is not None:
                return found.cut(_stepped(enough))
        return None

    def _paid(self, sources: Sequence[Source], budget: int) -> list[int]:
        """The rank of each source that the budget pays for."""
        most = [largest_rank(source) for source in sources]
        left = budget - sum(source.instruct.nbytes for source, top in zip(sources, most) if not top)
        if left < 0:
            taken = f"the tensors without a rank alone take {budget - left}"
            raise UsageError(f"a budget of {budget} bytes, and {taken}", "give a larger budget")
        costs = [RANK_STEP * rank_bytes(source) if top else 1 for source, top in zip(sources, most)]
        gains: list[list[float]] = []
        for source, top, cost in zip(sources, most, costs):
            top = min(top, left // cost * RANK_STEP)
            gained = _decomposed(source, top, self.seed).gains() if top else torch.zeros(0)
            gains.append(gained.view(-1, RANK_STEP).sum(1).tolist())
        return [RANK_STEP * steps for steps in spend(gains, costs, left)]


def largest_rank(source: Source) -> int:
    """The largest rank at which factors are smaller than the whole tensor; 0 for what has no rank,
    or is not finite."""
    shape = source.base.shape
    if len(shape) not in (2, 3) or not source.base.numel():
        return 0
    if not all(
        bool(torch.isfinite(tensor.sum(dtype=torch.float32)))
        for tensor in (source.base, source.instruct)
    ):
        return 0
    return (
        min((source.instruct.nbytes - 1) // rank_bytes(source), *shape[-2:])
        // RANK_STEP
        * RANK_STEP
    )


def rank_bytes(source: Source) -> int:
    """What one more rank of a matrix, or of every matrix of a stack, costs."""
    stack, (height, width) = math.prod(source.base.shape[:-2]), source.base.shape[-2:]
    return stack * (height + width) * source.dtype.itemsize


def spend(gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """How many steps each tensor gets: always the next one with the largest gain per byte, as long
    as it can be paid.

    Args:
        gains: for each tensor what each further step gains, descending.
        costs: for each tensor the bytes of a step.
    """
    steps = [0] * len(gains)
    waiting = [
        (-gain[0] / cost, t) for t, (gain, cost) in enumerate(zip(gains, costs)) if len(gain)
    ]
    heapq.heapify(waiting)
    while waiting:
        _, t = heapq.heappop(waiting)
        if costs[t] > budget:
            continue
        budget -= costs[t]
        steps[t] += 1
        if steps[t] < len(gains[t]):
            heapq.heappush(waiting, (-gains[t][steps[t]] / costs[t], t))
    return steps


@dataclass(frozen=True, eq=False)
class _Decomposition:
    """The leading directions of each matrix of `source`."""

    source: Source
    rank: int
    matrices: Sequence[Truncated]

    @property
    def energy(self) -> float:
        """‖I − B‖² of all."""
        return math.fsum(matrix.energy for matrix in self.matrices)

    def gains(self) -> Tensor:
        """What each rank holds of it, fp64 [R] on the host."""
        return torch.stack([matrix.s.double().square() for matrix in self.matrices]).sum(0).cpu()

    def cut(self, rank: int) -> _Decomposition:
        return _Decomposition(self.source, rank, self.matrices)

    def factors(self) -> Factors:
        rank = self.rank if self.energy else 0
        made = [factors(matrix, rank, self.source.dtype) for matrix in self.matrices]
        stack, shape = [torch.stack(side) for side in zip(*made)], self.source.base.shape[:-2]
        return Factors(*(side.reshape(*shape, *side.shape[1:]).contiguous() for side in stack))


def _decomposed(source: Source, rank: int, seed: int) -> _Decomposition:
    stacks = (side.reshape(-1, *side.shape[-2:]) for side in source.there())
    try:
        return _Decomposition(
            source,
            rank,
            [truncated_svd(base, inst, rank, seed=seed) for base, inst in zip(*stacks)],
        )
    except ValueError as error:
        raise DataError(
            f"`{source.name}` has no low-rank form: {error}",
            "use a dense or a sparse store for this pair",
        ) from None


def _stepped(rank: int) -> int:
    return -(-rank // RANK_STEP) * RANK_STEP

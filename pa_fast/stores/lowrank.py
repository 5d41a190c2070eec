"""The low-rank store: the leading singular directions of I − B, matrix by matrix. W(λ) = B + λ·UV
is written from the base and two thin factors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pa_kernels import lowrank as merging
from pa_kernels.svd import Truncated, factors, truncated_svd
from pa_kernels.tiles import is_on_cpu
from torch import Tensor

from pa_fast.checkpoint.safetensors import TensorInfo
from pa_fast.errors import DataError, UsageError
from pa_fast.stores.store import (
    DenseEntry,
    Entry,
    PartRule,
    Source,
    Store,
    TensorDescription,
    floats,
    shaped,
    spans,
)

_FIRST_RANK = 32
"""Directions of the first decomposition of a matrix for an energy."""


@dataclass(frozen=True, eq=False)
class Factors:
    """D = B + UV with U [..., M, R] and V [..., R, N]. Cost: R·(M + N) values, for each matrix of a
    stack."""

    u: Tensor
    v: Tensor


@dataclass
class LowRankStore(Store):
    """I − B cut to a rank, for each matrix and for each matrix of a stack (experts). This is an
    approximation: the weights of a full fine-tune are not of low rank. All other tensors, and those
    for which factors would take more bytes, are held in full.

    Args:
        rank: rank of every matrix; 64 by default. This very number: any from 1 on.
        energy: instead of `rank`: for each matrix the lowest rank that holds this share of
            ‖I − B‖², in (0, 1].
        budget_bytes: instead of `rank`: bytes of the whole delta. Each step of rank goes to the
            matrix where a byte gains the most of ‖I − B‖².
        seed: seed of the random start of the decomposition.
        attached: leave the factors beside the weights of linear and embedding layers, with λ as a
            scalar of their forward pass, instead of merging them. Only `pa_fast.load` supports it.

    A GPU's matrix units take factors in steps of 16 ranks: factors of other ranks are padded with
    zeros there, as they are bound. Entries, files and bytes are of the rank itself.

    Numerics: factors are U·√S and √S·V, rounded to the live dtype. A merge is
        `pa_kernels.reference.lowrank`, UV summed in fp32: one order, and so one result, per device.
        It is within |λ|·(R + 1)·2⁻²³·Σ|u·v| and one ulp of B + λ·UV; see `pa_kernels.LowRank`.
    Cost: the base, 2 bytes per bf16 weight, and R·(M + N) values; a switch moves 4 bytes per weight
        and computes 2R operations. Encoding takes a randomised decomposition of each matrix
        (`pa_kernels.svd`); for an energy one for each doubling of the rank; for a budget two, the
        first of the largest rank that it could pay for.

    Raises:
        UsageError: more than one of rank, energy and budget, or one that is not valid.
    """

    rank: int | None = None
    energy: float | None = None
    budget_bytes: int | None = None
    seed: int = 0
    attached: bool = False

    name = "lowrank"
    entry = Factors
    kinds, part_names = ("factors",), ("u", "v")
    options = ("rank", "energy", "budget", "seed")
    exact = lossless = False
    reads_base = True

    def __post_init__(self) -> None:
        options = {"rank": self.rank, "energy": self.energy, "budget": self.budget_bytes}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(given)} are given together",
                "the rank follows from one of rank, energy, budget",
            )
        for name, value in given.items():
            if not value > 0 or (name == "energy" and value > 1):
                allowed = "above 0 and up to 1" if name == "energy" else "of at least 1"
                raise UsageError(
                    f"{name} {value}, expected a number {allowed}",
                    "give one of: a rank, an energy, a budget in bytes",
                )
        if not given:
            self.rank = 64

    @classmethod
    def of_options(cls, budget: int | None = None, **options: Any) -> Store:
        """Return the store of these options, `budget` in bytes; see `Store.of_options`."""
        return cls(budget_bytes=budget, **options)

    def describe(self) -> str:
        """Return all options in one line."""
        size = f"rank {self.rank}"
        if self.energy is not None:
            size = f"energy {self.energy:g}"
        elif self.budget_bytes is not None:
            size = f"budget {self.budget_bytes} bytes"
        return f"{self.name}{' attached' if self.attached else ''}, {size}, seed {self.seed}"

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """Yield the entry of each source, in order and one at a time.

        Raises:
            UsageError: the budget is too small for the tensors that have no rank.
            DataError: a difference is not finite.
        """
        paid = None if self.budget_bytes is None else self._paid(sources, self.budget_bytes)
        for t, source in enumerate(sources):
            most, cut = largest_rank(source), None
            if most and paid is not None:
                cut = _decomposed(source, paid[t], self.seed)
            elif most and self.energy is not None:
                cut = self._enough(source, most, self.energy)
            elif self.rank is not None and self.rank <= most:
                cut = _decomposed(source, self.rank, self.seed)
            yield DenseEntry(source.instruct.to(source.device)) if cut is None else cut.factors()

    def _enough(self, source: Source, most: int, share: float) -> _Decomposition | None:
        """Return as many directions as hold `share` of the energy; None if they would cost more
        than the tensor in full."""
        rank = 0
        while rank < most:
            rank = min(max(2 * rank, _FIRST_RANK), most)
            cut = _decomposed(source, rank, self.seed)
            held = [0.0, *cut.gains().cumsum(0).tolist()]
            enough = next((k for k, sum_ in enumerate(held) if sum_ >= share * cut.energy), None)
            if enough is not None:
                return cut.cut(enough)
        return None

    def _paid(self, sources: Sequence[Source], budget: int) -> list[int]:
        """Return the rank of each source that the budget pays for."""
        most = [largest_rank(source) for source in sources]
        whole = sum(source.instruct.nbytes for source, top in zip(sources, most) if not top)
        rest = budget - whole
        if rest < 0:
            taken = f"the tensors without a rank alone take {whole}"
            raise UsageError(f"a budget of {budget} bytes, and {taken}", "give a larger budget")
        costs = [rank_bytes(source) if top else 1 for source, top in zip(sources, most)]
        gains: list[list[float]] = []
        for source, top, cost in zip(sources, most, costs):
            top = min(top, rest // cost)
            gains.append(_decomposed(source, top, self.seed).gains().tolist() if top else [])
        return spend(gains, costs, rest)

    def prepare(self) -> None:
        # padded here, the kernel makes no copies of its own beside these
        self.entries = [
            entry if is_on_cpu(live) else Factors(*merging.padded(entry.u, entry.v))
            for live, entry in zip(self.live, self.entries)
        ]
        u, v = ([getattr(entry, side) for entry in self.entries] for side in ("u", "v"))
        self._merge = merging.LowRank(self.live, self.base, u, v, self.intermediate_dtypes)

    def set_(self, lam: float | Sequence[float]) -> None:
        self._merge.run_(lam)

    def spans(self, k: int) -> Iterator[slice]:
        """Yield pieces of whole rows and, where possible, of whole tiles of rows; see
        `Store.spans`."""
        live = self.live[k]
        width = max(live.shape[-1], 1)
        largest = max((span.stop - span.start for span in spans(live)), default=0)
        step = max(largest // width // merging.ROWS, 1) * merging.ROWS * width
        for start in range(0, live.numel(), step):
            yield slice(start, min(start + step, live.numel()))

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        width = self.live[k].shape[-1]
        rows = slice(span.start // width, span.stop // width)
        return self._merge.merged(k, rows, lam).reshape(-1)

    def endpoints(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Return the base and W(1); see `Store.endpoints`."""
        return self.base[k].view(-1)[span], self.merged(k, span, 1.0)

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[PartRule]:
        yield from floats(infos, "u", "v")
        u, v, shape = infos["u"], infos["v"], tensor.shape
        fits = len(shape) in (2, 3) and len(u.shape) == len(shape)
        yield "u", fits, f"factors of a matrix, or of a stack of them; the tensor is {list(shape)}"
        rank = u.shape[-1]
        yield shaped(infos, "u", (*shape[:-1], rank))
        expected = (*shape[:-2], rank, shape[-1])
        yield "v", v.shape == expected and v.dtype == u.dtype, f"{u.dtype} {list(expected)}"

    @classmethod
    def pinned(cls, entry: Factors, copy_of: Callable[[Tensor], Tensor]) -> Factors:
        """Return `entry` unchanged: factors are small, and stay on the device; see
        `Store.pinned`."""
        return entry

    @classmethod
    def factors(cls, entry: Factors) -> tuple[Tensor, Tensor] | None:
        return (entry.u, entry.v) if entry.u.ndim == 2 else None


def largest_rank(source: Source) -> int:
    """Return the largest rank at which factors are smaller than the tensor in full; 0 for tensors
    without a rank, or not finite."""
    shape = source.base.shape
    if len(shape) not in (2, 3) or not source.base.numel():
        return 0
    sums = [side.sum(dtype=torch.float32) for side in (source.base, source.instruct)]
    if not all(bool(torch.isfinite(total)) for total in sums):
        return 0
    return min((source.instruct.nbytes - 1) // rank_bytes(source), *shape[-2:])


def rank_bytes(source: Source) -> int:
    """Return the bytes of one more rank of a matrix, or of every matrix of a stack."""
    stack, (height, width) = math.prod(source.base.shape[:-2]), source.base.shape[-2:]
    return stack * (height + width) * source.dtype.itemsize


def spend(gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """Return the number of steps for each tensor: a step always goes to the tensor with the largest
    gain per byte, as long as the budget pays for it.

    Args:
        gains: for each tensor the gain of each further step, descending.
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
        """‖I − B‖² of all matrices."""
        return math.fsum(matrix.energy for matrix in self.matrices)

    def gains(self) -> Tensor:
        """Return the share of the energy of each rank, fp64 [R] on the host."""
        return torch.stack([matrix.s.double().square() for matrix in self.matrices]).sum(0).cpu()

    def cut(self, rank: int) -> _Decomposition:
        return _Decomposition(self.source, rank, self.matrices)

    def factors(self) -> Factors:
        rank, shape = self.rank if self.energy else 0, self.source.base.shape[:-2]
        pairs = [factors(matrix, rank, self.source.dtype) for matrix in self.matrices]
        u, v = (torch.stack(side) for side in zip(*pairs))
        return Factors(*(s.reshape(*shape, *s.shape[1:]).contiguous() for s in (u, v)))


def _decomposed(source: Source, rank: int, seed: int) -> _Decomposition:
    stacks = (side.reshape(-1, *side.shape[-2:]) for side in source.on_device())
    try:
        matrices = [truncated_svd(base, inst, rank, seed=seed) for base, inst in zip(*stacks)]
    except ValueError as error:
        raise DataError(
            f"`{source.name}` has no low-rank form: {error}",
            "use a dense or a sparse store for this pair",
        ) from None
    return _Decomposition(source, rank, matrices)

"""The sparse store: base and target values at the positions that the delta changes; all other
elements always hold the base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pa_kernels
import torch
from pa_kernels.cores import inference, parallel_map
from pa_kernels.reference import BITS, folded, odd, odd_low, rounded
from pa_kernels.sparse import TILE, SparseTensor, sparse_bytes
from pa_kernels.switch import Written
from torch import Tensor

from pa_fast.checkpoint.safetensors import TensorInfo
from pa_fast.errors import DataError, UsageError
from pa_fast.stores import selection
from pa_fast.stores.store import (
    DenseEntry,
    Entry,
    PartRule,
    Source,
    Store,
    TensorDescription,
    floats,
    lists,
    shaped,
)

SELECTIONS = {"exact": None, "topk": None, "ties": 0.2, "dare": None}
"""Selections, with their default density."""

SCOPES = ("tensor", "global")

ROW_BYTES = 512
"""Bytes per row of a sum: the sum of each row is multiplied by an odd number of its own. With much
shorter rows that costs more than reading them."""


@dataclass
class SparseStore(Store):
    """The values of a delta at selected positions, and the positions. A tensor that would cost more
    so than in full is held in full.

    At other positions λ changes nothing, so a switch writes nothing there. The sum of those
    elements shows whether something else wrote to them: then the tensor is written anew from the
    base. The base is read for that, and to verify, and for nothing else.

    Args:
        select: `exact`: all weights that differ, so nothing is lost (for pairs that differ in few
            weights, as after RL or DPO); `topk`: the largest |I − B|; `ties`: the same for each
            tensor, a fifth of it by default (TIES-merging's trim); `dare`: each differing weight
            with probability `density`, its difference divided by `density`.
        density: share of the weights that is kept, in (0, 1].
        scope: whether `topk` takes that share of each `tensor`, or of all weights (`global`).
        seed: seed of `dare`. The draw is a function of (seed, name, element), whatever the order or
            the cutting of the work.

    Numerics: W(λ) is the contract between B and D, where D is B at positions that are not selected.
    Of equal magnitudes the first are selected.
    Cost: per moved bf16 weight 4 bytes and its position: 2 bytes, or 1 bit per weight of the tensor
        if more than 1/16 move. A switch writes only at the positions, and reads everything else
        once, to see that nothing else has written there. Encoding takes 3 reads of the sources for
        `topk` and `ties`, else 1; scratch of 2 bytes per weight of the largest tensor.
    Source: TIES: Yadav et al., arXiv 2306.01708. DARE: Yu et al., arXiv 2311.03099.

    Raises:
        UsageError: an option that does not exist, or that the selection does not accept.
    """

    select: str = "exact"
    density: float | None = None
    scope: str = "tensor"
    seed: int = 0

    name = "sparse"
    entry = SparseTensor
    kinds, part_names = ("index", "bitmap"), ("where", "starts", "base", "target")
    options = ("select", "density", "scope", "seed")

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
        self.lossless = self.select == "exact"
        if self.lossless and self.density is not None:
            raise UsageError(
                f"density {self.density} with selection `exact`",
                "exact takes what differs: choose topk, ties, dare",
            )
        if not self.lossless:
            share = SELECTIONS[self.select] if self.density is None else self.density
            if share is None or not 0 < share <= 1:
                given = "no density" if share is None else f"density {share}"
                raise UsageError(
                    f"`{self.select}` with {given}, expected one above 0 and up to 1",
                    "give the share of weights to keep, such as 0.1",
                )
            self.density = float(share)
        if not 0 <= self.seed < 2**32:
            raise UsageError(
                f"seed {self.seed}, expected a number from 0 to 4294967295", "leave it out for 0"
            )

    def describe(self) -> str:
        """Return all options in one line."""
        options = [f"{self.name} {self.select}"]
        if self.density is not None:
            scope = f" {self.scope}" if self.select == "topk" else ""
            options.append(f"density {self.density:g}{scope}")
        if self.select == "dare":
            options.append(f"seed {self.seed}")
        return ", ".join(options)

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """Yield the entry of each source, in order and one at a time.

        Raises:
            DataError: a rescaled weight does not fit into the live dtype.
        """
        cut = self._cut(sources) if self.scope == "global" else None
        for source in sources:
            base, instruct = (tensor.reshape(-1) for tensor in source.on_device())
            if self.select == "exact":
                mask = selection.changed(base, instruct)
            elif self.select == "dare":
                mask = selection.dare_mask(
                    source.name, base, instruct, self.density or 0, self.seed
                )
            elif cut is not None:
                mask, cut = selection.above(cut, base, instruct)
            else:
                mask, _ = selection.above(self._cut([source]), base, instruct)
            yield self._entry(source, mask, base, instruct)

    def _cut(self, sources: Sequence[Source]) -> selection.Cut:
        count = round((self.density or 0) * sum(source.base.numel() for source in sources))

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for source in sources:
                base, instruct = source.on_device()
                yield base.reshape(-1), instruct.reshape(-1)

        return selection.largest_cut(pairs, count)

    def _entry(self, source: Source, mask: Tensor, base: Tensor, instruct: Tensor) -> Entry:
        count = int(mask.sum())
        target_dtype = source.dtype if self.select == "dare" else instruct.dtype
        value_bytes = base.element_size() + target_dtype.itemsize
        if sparse_bytes(base.numel(), count, value_bytes) < value_bytes * base.numel():
            start, end = base[mask], instruct[mask]
            return SparseTensor.encode(mask, start, self._target(source, start, end), base.numel())
        if self.lossless:
            return DenseEntry(instruct.view(source.base.shape))
        values = self._target(source, base[mask], instruct[mask])
        # one dtype that holds both what moves and what stays
        dtype = base.dtype if base.dtype == values.dtype else torch.float32
        target = base.to(dtype, copy=True)
        target[mask] = values.to(dtype)
        return DenseEntry(target.view(source.base.shape))

    def _target(self, source: Source, start: Tensor, end: Tensor) -> Tensor:
        if self.select != "dare":
            return end
        scaled = start.float() + (end.float() - start.float()) / (self.density or 1)
        target = rounded(scaled, source.dtype, source.intermediate_dtype)
        lost = int((target.isinf() & ~end.isinf()).sum())
        if lost:
            raise DataError(
                f"`{source.name}`: {lost} weights rescaled by 1/{self.density:g} do not fit into"
                f" {source.dtype}",
                "choose a larger density, or a live dtype of a larger range",
            )
        return target

    def prepare(self) -> None:
        # a CPU works from index lists: held so from the start, nothing is held twice
        self.entries = [
            entry.as_index() if live.device.type == "cpu" else entry
            for live, entry in zip(self.live, self.entries)
        ]
        self._setting = pa_kernels.Sparse(self.live, self.entries, self.intermediate_dtypes)
        self._pieces = [
            (k, span, cut(entry, span))
            for k, entry in enumerate(self.entries)
            for span in self.spans(k)
        ]
        self._base_sums: list[int] | None = None
        self._lams: list[float] = []
        self._at_base: list[int] = []

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ) at the positions, and rewrite tensors to which something else has written
        elsewhere."""
        expected = self._base_sums
        assert expected is not None, "what these tensors hold is not known: restore_ them first"
        self.rewrite_({k for k, total in enumerate(self._sums()) if total != expected[k]})
        self._setting.run_(lam)
        self._lams = list(lam) if isinstance(lam, Sequence) else [lam] * len(self.live)

    def written(self) -> Sequence[Written]:
        """Return the checksum that tensors have with the base elsewhere, and the products over the
        positions: from values that are merged anew; see `Store.written`.

        Cost: per listed weight, a merge and 25 operations on 64-bit numbers.
        """
        return [self._written(k) for k in range(len(self.live))]

    def _written(self, k: int) -> Written:
        total, moved, distance = self._at_base[k], 0.0, 0.0
        for j, span, piece in self._pieces:
            if j != k or not piece.count:
                continue
            indices, dtype = piece.positions(), self.live[k].dtype
            values = torch.empty(piece.count, dtype=dtype, device=self.live[k].device)
            sides, dtypes = ([piece.base], [piece.target]), [self.intermediate_dtypes[k]]
            pa_kernels.lerp_([values], *sides, self._lams[k], intermediate_dtypes=dtypes)
            total += _element_terms(values, indices + span.start)
            total -= _element_terms(rounded(piece.base, dtype, dtypes[0]), indices + span.start)
            start, delta = piece.base.double(), piece.target.double() - piece.base.double()
            moved += float(torch.dot(values.double() - start, delta))
            distance += float(torch.dot(delta, delta))
        return Written(total % 2**64, (moved, distance))

    def restore_(self, base_of: Callable[[int], Tensor | None] = lambda k: None) -> None:
        """Write the base everywhere; see `Store.restore_`."""
        self.rewrite_(range(len(self.live)))
        if self._base_sums is None:
            self._base_sums = self._sums()
            self._at_base = pa_kernels.checksum(self.live)

    def rewrite_(self, written: Container[int]) -> None:
        for k, live in enumerate(self.live):
            if k in written:
                for span in self.spans(k):
                    live.view(-1)[span] = self._rounded_base(k, span)

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        out = self._rounded_base(k, span)
        piece = cut(self.entries[k], span)
        if piece.count:
            values = torch.empty(piece.count, dtype=out.dtype, device=out.device)
            dtypes = [self.intermediate_dtypes[k]]
            pa_kernels.lerp_(
                [values], [piece.base], [piece.target], lam, intermediate_dtypes=dtypes
            )
            bits = BITS[out.dtype]
            out.view(bits)[piece.positions()] = values.view(bits)
        return out

    def endpoints(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Return the endpoints in fp32; see `Store.endpoints`."""
        piece = cut(self.entries[k], span)
        base = self.base[k].view(-1)[span].to(self.live[k].device).float()
        target = base.clone()
        target[piece.positions()] = piece.target.float()
        return base, target

    def _sums(self) -> list[int]:
        """Return for each entry a sum of the live elements that no λ changes, mod 2⁶⁴. One read,
        and one wait for the device."""
        totals: list[int] = [0] * len(self.live)
        if self._pieces:
            parts = parallel_map(lambda piece: self._sum(*piece), self._pieces, self.live[0])
            for (k, *_), part in zip(self._pieces, parts):
                totals[k] += int(part)
        return [total % 2**64 for total in totals]

    def _sum(self, k: int, span: slice, piece: SparseTensor) -> Tensor:
        """Return what the elements `span` add to that sum: Σ over rows of odd(row) · Σ of their
        64-bit words, int64 []."""
        with inference():
            live = self.live[k].view(-1)[span]
            data = live.view(torch.uint8)
            if data.storage_offset() % 8 or data.numel() % ROW_BYTES:
                padded = torch.zeros(
                    -(-data.numel() // ROW_BYTES) * ROW_BYTES, dtype=torch.uint8, device=live.device
                )
                padded[: data.numel()] = data
                data = padded
            rows = data.view(torch.int64).view(-1, ROW_BYTES // 8).sum(1)
            factors = _row_factors(rows.numel(), live.device)
            total = (rows * factors).sum()
            if piece.count:
                positions, per_word = piece.positions(), 8 // live.itemsize
                values = live.view(BITS[live.dtype])[positions].long() & (
                    (1 << 8 * live.itemsize) - 1
                )
                values <<= (positions % per_word) * (8 * live.itemsize)
                total -= (values * factors[positions // (ROW_BYTES // live.itemsize)]).sum()
            return total * (2 * span.start + 1)

    def _rounded_base(self, k: int, span: slice) -> Tensor:
        live = self.live[k]
        base = self.base[k].view(-1)[span].to(live.device)
        return rounded(base, live.dtype, self.intermediate_dtypes[k])

    @classmethod
    def kind(cls, entry: SparseTensor) -> str:
        return entry.kind

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[PartRule]:
        where = {"index": "U16", "bitmap": "I32"}[tensor.kind]
        yield from lists(infos, where=where, starts="I64")
        yield from floats(infos, "base", "target")
        yield from lists(infos, base=tensor.base)
        yield shaped(infos, "target", infos["base"].shape)

    @classmethod
    def from_parts(cls, tensor: TensorDescription, parts: Mapping[str, Tensor]) -> SparseTensor:
        numel = torch.Size(tensor.shape).numel()
        entry = SparseTensor(tensor.kind, numel, **parts)  # type: ignore[arg-type]
        entry.check()
        return entry


def unchanged(base: Tensor) -> SparseTensor:
    """Return an empty delta, with which a tensor is its base at every λ."""
    none, where = base.reshape(-1)[:0], torch.zeros(0, dtype=torch.int64, device=base.device)
    return SparseTensor.encode(where, none, none, base.numel())


def cut(entry: SparseTensor, span: slice) -> SparseTensor:
    """Return the part of `entry` within `span`, which begins with a tile; views, except for
    `starts`."""
    tile = TILE[entry.kind]
    starts = entry.starts[span.start // tile : -(-span.stop // tile) + 1]
    first, last = starts[[0, -1]].tolist()
    words = slice(span.start // 32, -(-span.stop // tile) * (tile // 32))
    where = entry.where[first:last] if entry.kind == "index" else entry.where[words]
    values = slice(first, last)
    base, target = entry.base[values], entry.target[values]
    return SparseTensor(entry.kind, span.stop - span.start, where, starts - first, base, target)


@functools.lru_cache(maxsize=256)
def _row_factors(count: int, device: torch.device) -> Tensor:
    return odd_low(torch.arange(count, device=device))


def _element_terms(values: Tensor, positions: Tensor) -> int:
    """Return what elements of these values at these places add to their tensor's checksum."""
    bits, per_word = 8 * values.itemsize, 8 // values.itemsize
    patterns = values.view(BITS[values.dtype]).long() & ((1 << bits) - 1)
    words = folded(patterns << (positions % per_word * bits))
    return int((words * odd(positions // per_word)).sum())

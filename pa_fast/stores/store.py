"""`Store`: one class for each way to hold the delta between two tensors beside the live one.

A store begins as its options, and encodes sources to entries, one for each live tensor. A new
object of the class that owns an entry is then bound to live tensors and switches them. Other code
asks this object for everything it must know: a new store implements `Store` and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pa_kernels
import torch
from pa_kernels.reference import Draw
from pa_kernels.switch import Written
from torch import Tensor

from pa_fast.checkpoint.safetensors import FLOATS, TensorInfo
from pa_fast.errors import UsageError

# Elements merged at a time where a merge is only compared: on a CPU the pieces stay in cache
# between the passes over them, and each is worth the cost of a call; on a GPU one launch hides its
# latency.
_CPU_SPAN = 1 << 20
_GPU_SPAN = 1 << 24

Entry = Any
"""The delta of one live tensor: a frozen dataclass of tensors, `Store.entry` of its store."""

PartRule = tuple[str, bool, str]
"""A rule for a part of an entry in a file: the part, whether it fits, and the rule in words."""


@dataclass(frozen=True, eq=False)
class Source:
    """The two tensors that one live tensor interpolates.

    Attributes:
        name: the live tensor's first name.
        base, instruct: of one shape, bf16, fp16 or fp32, on any device.
        dtype, device: of the live tensor.
        intermediate_dtype: the dtype that a merge is rounded to before `dtype`, or None.
    """

    name: str
    base: Tensor
    instruct: Tensor
    dtype: torch.dtype
    device: torch.device
    intermediate_dtype: torch.dtype | None = None

    def on_device(self) -> tuple[Tensor, Tensor]:
        """Return base and instruct on the live tensor's device: these very tensors, or copies."""
        return self.base.to(self.device), self.instruct.to(self.device)


@dataclass(frozen=True)
class TensorSize:
    """A live tensor and the bytes that a dense delta keeps beside it, with base and instruct to
    sample if they are at hand."""

    name: str
    live_bytes: int
    beside_bytes: int
    sides: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TensorDescription:
    """Description of one tensor in a delta file.

    Attributes:
        kind: of its entry, see `Store.kinds`.
        shape: of the live tensor.
        base, live, intermediate_dtype: safetensors dtypes of base and live tensor, and the one that
            a merge is rounded to before that of the live tensor, or None.
        data: fingerprint of the parts, in hex.
        endpoint_sums: checksums of the live tensor at λ = 0 and 1, in hex; None if they depend on
            the device.
    """

    kind: str
    shape: tuple[int, ...]
    base: str
    live: str
    intermediate_dtype: str | None
    data: str
    endpoint_sums: tuple[str | None, str | None]


class Overwritten(Exception):
    """Live tensors, by number, do not hold what the last switch wrote to them."""

    def __init__(self, entries: Sequence[int]):
        super().__init__(f"entries {list(entries)} were overwritten")
        self.entries = list(entries)


class Store:
    """One way to hold a delta. A subclass is a dataclass of its options, which all have defaults.

    A store must define its name, the names of its entries and their parts, `encode`, `set_`,
    `merged`, `endpoints`, and `part_rules` to refuse malformed files; the rest has defaults. After
    `bind`, live tensors and entries are numbered from 0, and a span is a slice of a tensor's flat
    elements.

    Attributes:
        name: name of the store.
        entry: class of its entries.
        kinds: names of its entries in a delta file.
        part_names: names of the tensors of each entry, `NAME::PART` in a file; a store whose kinds
            differ in them defines `parts_of`.
        options: options of `pa_fast.encode`, see `of_options`.
        exact: whether live weights are, bit for bit on every device, the contract between the base
            and the delta's own endpoint W(1).
        lossless: whether that endpoint is the instruct model.
        range: the least and the largest λ that live weights can be set to; None for any.
        attached: whether an engine leaves the delta beside its layers instead of merging it.
        needs_base: whether the base must be kept; else it is kept if that costs no memory.
        reads_base: whether every switch reads the base.
        keeps_sources: whether entries are the sources themselves, unread, and `write_` writes a
            span from them alone, so that the first write can check each piece as it reads it.
        stochastic: whether a merge may be rounded with noise.
        host_parts: tensors of an entry that stay on the CPU, wherever the others are.
    """

    name: ClassVar[str]
    entry: ClassVar[type]
    kinds: ClassVar[tuple[str, ...]]
    part_names: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ()
    host_parts: ClassVar[tuple[str, ...]] = ()
    exact: bool = True
    lossless: bool = True
    range: tuple[float, float] | None = None
    attached: bool = False
    needs_base: bool = True
    reads_base: bool = False
    keeps_sources: bool = False
    stochastic: bool = False

    @classmethod
    def of_options(cls, **options: Any) -> Store:
        """Return the store with those of `options` that were given to `pa_fast.encode`."""
        return cls(**options)

    def describe(self) -> str:
        """Return all options in one line."""
        return self.name

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """Yield the entry of each source, in order, one at a time: no other entry is held."""
        raise NotImplementedError

    def estimate(self, sizes: Sequence[TensorSize]) -> int | None:
        """Return the bytes that entries will take beside the live copy; None if only encoding
        tells."""
        return None

    # ---- live tensors

    def bind(
        self,
        live: Sequence[Tensor],
        base: Sequence[Any],
        entries: Sequence[Entry],
        intermediate_dtypes: Sequence[torch.dtype | None],
        draws: Sequence[Draw | None] | None = None,
    ) -> None:
        """Take T live tensors to switch.

        Args:
            live, base: contiguous tensors; those of one number have the same shape. A base may lie
                elsewhere, such as in a memory map. If `reads_base`, it is copied to the live
                tensor's device, unless it is in pinned host memory, which a GPU reads directly.
                If not `needs_base`, it may be a weak reference.
            entries: on the devices of the live tensors.
            intermediate_dtypes: for each tensor the dtype that a merge is rounded to before it is
                stored, or None for the live dtype.
            draws: for each tensor the noise of stochastic rounding, or None.
        """
        self.live, self.base, self.entries = list(live), list(base), list(entries)
        if self.reads_base:
            self.base = [b if b.is_pinned() else b.to(w.device) for w, b in zip(live, base)]
        self.intermediate_dtypes = list(intermediate_dtypes)
        self.draws = [None] * len(self.live) if draws is None else list(draws)
        self.prepare()

    def prepare(self) -> None:
        """Prepare for switches, once live tensors and entries are set."""

    def check(self, lam: float | Sequence[float]) -> None:
        """Raise UsageError if a λ is outside the range."""
        if self.range is None:
            return
        lo, hi = self.range
        for one in lam if isinstance(lam, Sequence) else [lam]:
            if not lo <= pa_kernels.reference.fp32(one) <= hi:
                raise UsageError(
                    f"λ = {one:g} is outside [{lo:g}, {hi:g}], the range that the {self.name} delta"
                    " is for",
                    self.range_hint,
                )

    range_hint: ClassVar[str] = "choose λ within it, or use the dense store"

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ), of one λ for all or of one for each, to the elements that depend on λ.

        Raises:
            Overwritten: something else wrote to tensors whose switch starts from what they hold. On
                a GPU `overwritten` says so instead.
        """
        raise NotImplementedError

    def written(self) -> Sequence[Written | None]:
        """Return what the last `set_` wrote to each tensor, summed as it was written; None where
        the store does not know. Waits for the device."""
        return [None] * len(self.live)

    def overwritten(self) -> Sequence[int]:
        """Return tensors that something else had written to before a switch that starts from what
        they hold, where `set_` has not said so: on a GPU it would wait. Waits for the device."""
        return []

    def restore_(self, base_of: Callable[[int], Tensor | None] = lambda k: None) -> None:
        """Write the elements that do not depend on λ: with `set_`, every byte of every live tensor.

        Args:
            base_of: returns the base of a tensor that is not kept, or None.
        """

    def rewrite_(self, written: Container[int]) -> None:
        """Write the elements that `set_` does not write of the tensors `written`, to which
        something else has written."""

    def known_sum(self, k: int) -> int | None:
        """Return the checksum that live tensor k must have, if nothing else is known of it:
        `merged` cannot be called then."""
        return None

    def spans(self, k: int) -> Iterator[slice]:
        """Yield pieces of tensor k that are small enough to merge separately."""
        return spans(self.live[k])

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """Merge a piece of tensor k anew, in the live dtype, without reading a live tensor."""
        raise NotImplementedError

    def merged_together(
        self, pieces: Sequence[tuple[int, slice]], lams: Sequence[float]
    ) -> list[Tensor]:
        """Merge pieces of several tensors anew, each for its λ; see `merged`."""
        return [self.merged(k, span, lam) for (k, span), lam in zip(pieces, lams)]

    def write_(self, k: int, span: slice, lam: float) -> None:
        """Write a piece of tensor k alone."""
        self.live[k].detach().view(-1)[span] = self.merged(k, span, lam)

    def endpoints(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Return base and the delta's own endpoint W(1) of a piece of tensor k, in any float
        dtypes; possibly the sources themselves."""
        raise NotImplementedError

    def beside(self) -> list[Tensor]:
        """Return every tensor that is kept beside the live copy."""
        bases = [base for base in self.base if isinstance(base, Tensor)]
        return [*bases, *(part for e in self.entries for part in self.parts(e).values())]

    # ---- entries, and their parts in a file

    @classmethod
    def kind(cls, entry: Entry) -> str:
        """Return which of `kinds` an entry is."""
        (kind,) = cls.kinds
        return kind

    @classmethod
    def parts_of(cls, kind: str) -> tuple[str, ...]:
        """Return the names of the tensors of each entry of a kind."""
        return cls.part_names

    @classmethod
    def parts(cls, entry: Entry) -> dict[str, Tensor]:
        """Return the tensors of an entry, by their names in a file."""
        return {part: getattr(entry, part) for part in cls.parts_of(cls.kind(entry))}

    @classmethod
    def nbytes(cls, entry: Entry) -> int:
        """Return the bytes of an entry."""
        return sum(part.nbytes for part in cls.parts(entry).values())

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[PartRule]:
        """Yield the rules for dtypes and shapes of the parts, given the file's description of
        them."""
        return iter(())

    @classmethod
    def of_older_format(
        cls, tensor: TensorDescription, parts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parts of an entry of a file of an older format as this version has them; the
        file's own are not written to."""
        return parts

    @classmethod
    def from_parts(cls, tensor: TensorDescription, parts: Mapping[str, Tensor]) -> Entry:
        """Build the entry that a file describes, and check its contents.

        Raises:
            ValueError: naming what was found and what was expected.
        """
        return cls.entry(**parts)

    @classmethod
    def misfit(cls, entry: Entry, base: Tensor) -> str | None:
        """Describe what of an entry from a file does not fit this base although both endpoints do;
        None if all fits."""
        return None

    @classmethod
    def pinned(cls, entry: Entry, copy_of: Callable[[Tensor], Tensor]) -> Entry:
        """Return `entry` with its large tensors replaced by copies in pinned host memory."""
        parts = cls.parts(entry).items()
        return replace(entry, **{n: copy_of(p) for n, p in parts if n not in cls.host_parts})

    @classmethod
    def factors(cls, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """Return U [M, R] and V [R, N] of a matrix with W(1) = B + UV, which an engine may leave
        beside its layer; None if there are none."""
        return None


@dataclass(frozen=True, eq=False)
class DenseEntry:
    """A delta given by its endpoint W(1): the target, in the shape of the live tensor. Cost:
    |target| bytes per weight."""

    target: Tensor


def tapped(store: Store, pass_on: Callable[[Source, Entry], Entry]) -> Store:
    """Return `store`, with its own description, which yields `pass_on(source, entry)` for each
    entry that it encodes."""
    tap = copy.copy(store)

    def encode(sources: Sequence[Source]) -> Iterator[Entry]:
        for source, entry in zip(sources, store.encode(sources)):
            yield pass_on(source, entry)

    vars(tap).update(encode=encode, describe=store.describe)
    return tap


def spans(live: Tensor) -> Iterator[slice]:
    """Yield pieces of a tensor, as slices of its flat elements."""
    step = span_elements(live.device)
    for start in range(0, live.numel(), step):
        yield slice(start, min(start + step, live.numel()))


def span_elements(device: torch.device) -> int:
    """Return the number of elements that are merged at a time on `device`."""
    return _CPU_SPAN if device.type == "cpu" else _GPU_SPAN


def floats(infos: Mapping[str, TensorInfo], *parts: str) -> Iterator[PartRule]:
    """Yield the rules that parts of a file have dtypes which can be interpolated."""
    for part in parts:
        yield part, infos[part].dtype in FLOATS, f"one of {', '.join(sorted(FLOATS))}"


def lists(infos: Mapping[str, TensorInfo], **dtypes: str) -> Iterator[PartRule]:
    """Yield the rules that parts of a file are lists of these safetensors dtypes."""
    for part, dtype in dtypes.items():
        info = infos[part]
        yield part, info.dtype == dtype and len(info.shape) == 1, f"a list of {dtype}"


def shaped(infos: Mapping[str, TensorInfo], part: str, shape: tuple[int, ...]) -> PartRule:
    """Return the rule that a part of a file has this shape."""
    return part, infos[part].shape == shape, f"shape {list(shape)}"

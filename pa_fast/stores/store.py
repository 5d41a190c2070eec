"""What a store is: one class for one way to hold the delta between two tensors beside the live one.

A store begins as its options. It encodes sources to entries, one for each live tensor. A fresh
object of the class that owns an entry, bound to live tensors, then switches them. Everything that
others must know of a store they ask this object: what is in `Store` is all that there is to write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pa_kernels
import torch
from pa_kernels.reference import Draw
from torch import Tensor

from pa_fast.checkpoint.safetensors import FLOATS, TensorInfo
from pa_fast.errors import UsageError

# Elements merged at a time where a merge is only looked at: on a CPU the pieces stay in cache
# between the passes over them and each is worth the cost of a call; on a GPU one launch hides its
# latency.
_CPU_SPAN = 1 << 20
_GPU_SPAN = 1 << 24

Entry = Any
"""The delta of one live tensor: a frozen dataclass of tensors, `Store.entry` of its store."""

Rule = tuple[str, bool, str]
"""A part of an entry in a file, whether it is what it must be, and what that is in words."""


@dataclass(frozen=True, eq=False)
class Source:
    """The two tensors that one live tensor lies between.

    Attributes:
        name: the live tensor's first name.
        base, instruct: of one shape, bf16, fp16 or fp32, wherever they lie.
        dtype, device: of the live tensor.
        intermediate_dtype: the dtype that a merge is rounded to before its own, or None.
    """

    name: str
    base: Tensor
    instruct: Tensor
    dtype: torch.dtype
    device: torch.device
    intermediate_dtype: torch.dtype | None = None

    def on_device(self) -> tuple[Tensor, Tensor]:
        """Base and instruct where the live tensor is: these very tensors, or copies."""
        return self.base.to(self.device), self.instruct.to(self.device)


@dataclass(frozen=True)
class TensorSize:
    """A live tensor and what a dense delta keeps beside it, in bytes; base and instruct to sample
    where they are at hand."""

    name: str
    live_bytes: int
    beside_bytes: int
    sides: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TensorDescription:
    """What a delta file says of one tensor.

    Attributes:
        kind: of its entry, see `Store.kinds`.
        shape: of the live tensor.
        base, live, intermediate_dtype: safetensors dtypes of base and live tensor, and the one to
            round to before the latter, or None.
        data: fingerprint of the parts, in hex.
        ends: checksums of the live tensor at λ = 0 and 1, in hex; None where they depend on the
            device.
    """

    kind: str
    shape: tuple[int, ...]
    base: str
    live: str
    intermediate_dtype: str | None
    data: str
    ends: tuple[str | None, str | None]


class Overwritten(Exception):
    """Live tensors, by number, did not hold what the last switch had left in them."""

    def __init__(self, entries: Sequence[int]):
        super().__init__(f"entries {list(entries)} were overwritten")
        self.entries = list(entries)


class Store:
    """One way to hold a delta. A subclass is a dataclass of its options, which all have defaults.

    What a store must have are the names of itself, its entries and their parts, `encode`, `set_`,
    `merged`, `ends`, and `part_rules` for what is to be refused in files; the rest has defaults.
    After `bind`, live tensors and entries are numbered from 0, and a span is a slice of a tensor's
    flat elements.

    Attributes:
        name: by which it is asked for.
        entry: the class of its entries.
        kinds: what a delta file calls them.
        part_names: the tensors of each, `NAME::PART` in a file.
        options: of `pa_fast.encode`, see `of_options`.
        exact: whether live weights are, bit for bit on every device, the contract between the base
            and the delta's own end.
        lossless: whether that end is the instruct model.
        range: the least and the largest λ that live weights can be set to; None for any.
        attached: whether an engine leaves the delta beside its layers instead of merging it.
        needs_base: whether the base must be kept; else it is kept where that costs no memory.
        reads_base: whether every switch reads the base.
        keeps_sources: whether entries are the sources themselves, not looked at, and `write_`
            writes a span from them alone: then the first write can check each piece as it reads it.
        stochastic: whether a merge may be rounded with noise.
        host_parts: tensors of an entry that stay on the CPU wherever the others are.
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
        """The store with those of `options` that were given to `pa_fast.encode`."""
        return cls(**options)

    def describe(self) -> str:
        """All options in one line."""
        return self.name

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entry of each source, in order and one at a time: only what is asked for is held."""
        raise NotImplementedError

    def estimate(self, sizes: Sequence[TensorSize]) -> int | None:
        """Bytes that entries will take beside the live copy, None where only encoding tells."""
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
                elsewhere, such as in a memory map; where `reads_base`, it is copied to the live
                tensor's device, unless it is in pinned host memory, which a GPU reads where it is.
                Where not `needs_base`, it may be a weak reference.
            entries: where the live tensors are.
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
        """Make what switches need, once live tensors and entries are there."""

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
        """Write W(λ), of one λ for all or of one for each, as far as another λ would give something
        else.

        Raises:
            Overwritten: somebody else wrote to tensors that are switched from what they hold.
        """
        raise NotImplementedError

    def restore_(self, base_of: Callable[[int], Tensor | None] = lambda k: None) -> None:
        """Write what no λ changes: with `set_`, every byte of every live tensor.

        Args:
            base_of: gives the base of a tensor that is not kept, or None.
        """

    def rewrite_(self, written: Container[int]) -> None:
        """Write what `set_` leaves alone of the tensors `written`, which something else has
        written to."""

    def known_sum(self, k: int) -> int | None:
        """The checksum that live tensor k must have, where that is all that is known of it:
        `merged` cannot be asked then."""
        return None

    def spans(self, k: int) -> Iterator[slice]:
        """Pieces of tensor k that are small enough to merge on the side."""
        return spans(self.live[k])

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """A fresh merge of a piece of tensor k, in the live dtype, which looks at no live
        tensor."""
        raise NotImplementedError

    def write_(self, k: int, span: slice, lam: float) -> None:
        """Write a piece of tensor k alone."""
        self.live[k].detach().view(-1)[span] = self.merged(k, span, lam)

    def ends(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Base and the delta's own end of a piece of tensor k, in any float dtypes; possibly the
        sources themselves."""
        raise NotImplementedError

    def beside(self) -> list[Tensor]:
        """Every tensor that is kept beside the live copy."""
        bases = [base for base in self.base if isinstance(base, Tensor)]
        return [*bases, *(part for e in self.entries for part in self.parts(e).values())]

    # ---- entries, and their parts in a file

    @classmethod
    def kind(cls, entry: Entry) -> str:
        """The one of `kinds` that an entry is of."""
        (kind,) = cls.kinds
        return kind

    @classmethod
    def parts(cls, entry: Entry) -> dict[str, Tensor]:
        """The tensors that an entry consists of, by the names that they have in a file."""
        return {part: getattr(entry, part) for part in cls.part_names}

    @classmethod
    def nbytes(cls, entry: Entry) -> int:
        """Bytes of an entry."""
        return sum(part.nbytes for part in cls.parts(entry).values())

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[Rule]:
        """What dtypes and shapes of the parts must be, by what the file says of them."""
        return iter(())

    @classmethod
    def from_parts(cls, tensor: TensorDescription, parts: Mapping[str, Tensor]) -> Entry:
        """The entry that a file describes, its contents checked.

        Raises:
            ValueError: saying what was found and what was expected.
        """
        return cls.entry(**parts)

    @classmethod
    def misfit(cls, entry: Entry, base: Tensor) -> str | None:
        """What of an entry from a file does not hold with this base, in words, although both ends
        do; None where all holds."""
        return None

    @classmethod
    def pinned(cls, entry: Entry, copy_of: Callable[[Tensor], Tensor]) -> Entry:
        """`entry` with its large tensors replaced by copies in pinned host memory."""
        parts = cls.parts(entry).items()
        return replace(entry, **{n: copy_of(p) for n, p in parts if n not in cls.host_parts})

    @classmethod
    def factors(cls, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """U [M, R] and V [R, N] of a matrix with W(1) = B + UV, which an engine may leave beside
        its layer; None where there are none."""
        return None


@dataclass(frozen=True, eq=False)
class DenseEntry:
    """A delta given by its end: the target, in the shape of the live tensor. Cost: |target| bytes
    per weight."""

    target: Tensor


def tapped(store: Store, pass_on: Callable[[Source, Entry], Entry]) -> Store:
    """`store`, by its own description, which holds what `pass_on` makes of each source and entry
    that it encodes."""
    tap = copy.copy(store)

    def encode(sources: Sequence[Source]) -> Iterator[Entry]:
        for source, entry in zip(sources, store.encode(sources)):
            yield pass_on(source, entry)

    vars(tap).update(encode=encode, describe=store.describe)
    return tap


def spans(live: Tensor) -> Iterator[slice]:
    """Pieces of a tensor, as slices of its flat elements."""
    step = _CPU_SPAN if live.device.type == "cpu" else _GPU_SPAN
    for start in range(0, live.numel(), step):
        yield slice(start, min(start + step, live.numel()))


def floats(infos: Mapping[str, TensorInfo], *parts: str) -> Iterator[Rule]:
    """The rules that parts of a file are of dtypes which are interpolated."""
    for part in parts:
        yield part, infos[part].dtype in FLOATS, f"one of {', '.join(sorted(FLOATS))}"


def lists(infos: Mapping[str, TensorInfo], **dtypes: str) -> Iterator[Rule]:
    """The rules that parts of a file are lists of these safetensors dtypes."""
    for part, dtype in dtypes.items():
        info = infos[part]
        yield part, info.dtype == dtype and len(info.shape) == 1, f"a list of {dtype}"


def shaped(infos: Mapping[str, TensorInfo], part: str, shape: tuple[int, ...]) -> Rule:
    """The rule that a part of a file has this shape."""
    return part, infos[part].shape == shape, f"shape {list(shape)}"

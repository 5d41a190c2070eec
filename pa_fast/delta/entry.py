"""What a delta is made of: one entry for each live tensor, of the kind that its store chose for
it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pa_kernels import PackedTensor, SparseTensor
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """The two tensors that one live tensor lies between.

    Attributes:
        name: the live tensor's first name.
        base, instruct: of one shape, bf16, fp16 or fp32, wherever they lie.
        dtype, device: of the live tensor.
        via: the dtype that a merge is rounded to before its own, or None.
    """

    name: str
    base: Tensor
    instruct: Tensor
    dtype: torch.dtype
    device: torch.device
    via: torch.dtype | None = None

    def there(self) -> tuple[Tensor, Tensor]:
        """Base and instruct where the live tensor is: these very tensors, or copies."""
        return self.base.to(self.device), self.instruct.to(self.device)


@dataclass(frozen=True, eq=False)
class Whole:
    """A delta given by its end: the target, in the shape of the live tensor. Cost: |target| bytes
    per weight."""

    target: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """D = B + UV with U [..., M, R] and V [..., R, N]. Cost: R·(M + N) values, for each matrix of a
    stack."""

    u: Tensor
    v: Tensor


Entry = Whole | SparseTensor | PackedTensor | Factors


class Store(Protocol):
    """How deltas are to be held: options, and the way from sources to entries.

    Attributes:
        exact: whether live weights are, bit for bit, the contract between the base and the delta's
            own end.
        lossless: whether that end is the instruct model.
    """

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def lossless(self) -> bool: ...

    def describe(self) -> str:
        """All options in one line."""
        ...

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entry of each source, in order and one at a time: only what is asked for is held."""
        ...


def parts(entry: Entry) -> dict[str, Tensor]:
    """The tensors that an entry consists of, by the names that they have in a file."""
    if isinstance(entry, PackedTensor):
        return entry.parts
    names = {
        Whole: ("target",),
        Factors: ("u", "v"),
        SparseTensor: ("where", "starts", "base", "target"),
    }[type(entry)]
    return {name: getattr(entry, name) for name in names}


def kind(entry: Entry) -> str:
    """What a delta file calls an entry of this kind."""
    if isinstance(entry, PackedTensor):
        return f"packed{entry.width}"
    return (
        entry.kind
        if isinstance(entry, SparseTensor)
        else {Whole: "whole", Factors: "factors"}[type(entry)]
    )


def nbytes(entry: Entry) -> int:
    """Bytes of an entry."""
    return sum(part.nbytes for part in parts(entry).values())

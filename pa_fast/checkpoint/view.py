"""A checkpoint seen under other names, with tensors that transformers' conversions make of its
own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pa_fast.checkpoint.header import TensorInfo
from pa_fast.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import torch

    Make = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class InMemory(Protocol):
    """What holds tensors by name, such as a checkpoint."""

    def tensor_in_memory(self, name: str) -> torch.Tensor: ...


class Conversion:
    """Tensors that are made together of tensors of a checkpoint, and held in memory while they are
    read.

    They are made when the first element is asked for, and let go when all were read once, or
    `release` was called for every name; asked again, they are made again.

    Args:
        own: what holds `sources`.
        infos: what is made: name, dtype and shape.
        make: the tensors by the names of `infos`, of those by the names of `sources`.

    Cost: memory for `sources` and what is made of them, at most about twice that while it is made.
    """

    def __init__(
        self, own: InMemory, sources: Sequence[str], infos: Sequence[TensorInfo], make: Make
    ):
        self.sources = tuple(sources)
        self.names = tuple(info.name for info in infos)
        self._own = own
        self._make = make
        self._count = sum(info.count for info in infos)
        self._lock = threading.Lock()
        self._held: dict[str, torch.Tensor] = {}
        self._left = 0
        self._released: set[str] = set()

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor `name`.

        Raises:
            PairError: the conversion cannot be undone for the layout that is asked for.
            DataError: a file cannot be read, or changed.
        """
        with self._lock:
            if not self._held:
                tensors = {key: self._own.tensor_in_memory(key) for key in self.sources}
                self._held = {
                    key: tensor.contiguous().view(-1) for key, tensor in self._make(tensors).items()
                }
                self._left, self._released = self._count, set()
            found = self._held[name][start:stop]
            self._left -= stop - start
            if self._left <= 0:
                self._held = {}
            return found

    def release(self, name: str) -> None:
        """Say that `name` was read as far as it will be."""
        with self._lock:
            self._released.add(name)
            if self._released.issuperset(self.names):
                self._held = {}


class View(Checkpoint):
    """`own` under other names. Its fingerprints and file states are those of `own`.

    Args:
        names: name in this view → name in `own`.
        conversions: what is made of tensors of `own`, beside.
    """

    def __init__(
        self,
        own: Checkpoint,
        names: Mapping[str, str],
        conversions: Mapping[TensorInfo, Conversion] | None = None,
    ):
        tensors = {name: replace(own.tensors[key], name=name) for name, key in names.items()}
        tensors |= {info.name: info for info in conversions or {}}
        super().__init__(own.folder, own.config, tensors, own._files)
        self._own = own
        self._names = dict(names)
        self._conversions = {info.name: one for info, one in (conversions or {}).items()}

    @property
    def own(self) -> Checkpoint:
        return self._own

    def own_name(self, name: str) -> str | None:
        return self._names.get(name)

    def made_with(self, name: str) -> tuple[str, ...]:
        return self._conversions[name].names if name in self._conversions else (name,)

    def release(self, name: str) -> None:
        if name in self._conversions:
            self._conversions[name].release(name)

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._conversions:
            return self.chunk(name, 0, self.tensors[name].count).view(self.tensors[name].shape)
        return self._own.tensor(self._names[name])

    def chunk(
        self, name: str, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if name not in self._conversions:
            return self._own.chunk(self._names[name], start, stop, out)
        found = self._conversions[name].elements(name, start, stop)
        return found if out is None else out.copy_(found)

    def check_unchanged(self, name: str) -> None:
        for key in (
            self._conversions[name].sources if name in self._conversions else (self._names[name],)
        ):
            self._own.check_unchanged(key)

    def quick_fingerprint(self) -> str:
        return self._own.quick_fingerprint()

"""A checkpoint folder open for reading: headers at once, tensors later as views of memory maps."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from pa_fast.checkpoint.folder import (
    check_not_quantised,
    check_redirects,
    check_regular,
    read_shards,
)
from pa_fast.checkpoint.safetensors import TensorInfo, WeightFile, read_object
from pa_fast.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Make = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


SAMPLE_BYTES = 4096
_COMPARED = 2**20


class Checkpoint:
    """One checkpoint: `folder`, `config` (config.json) and `tensors` (by name, in file and byte
    order).

    A context manager. Views that were handed out stay valid after `close`. They are read-only:
    writing to one ends the process, because a source must never change.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        files: dict[Path, WeightFile],
    ):
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self._files = files

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json, the index and every shard header of the local `folder`. Tensor data are
        not read, and torch is not imported.

        The folder is checked for pipes and devices, which would block later readers of its files.

        Raises:
            CheckpointError: any defect that headers show, naming file, tensor, what was found and
                what was expected.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", "give the folder that holds config.json and the weights"
            )
        try:
            check_regular(folder)
            headers = read_shards(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be read: {error.strerror}", "check its permissions"
            ) from None
        config = read_object(folder / "config.json")
        check_redirects(folder, config)
        tensors = {name: info for header in headers for name, info in header.tensors.items()}
        check_not_quantised(folder, config, tensors.values())
        if not tensors:
            raise CheckpointError(f"{folder}: its weight files hold no tensor", "check the path")
        files: dict[Path, WeightFile] = {}
        try:
            for header in headers:
                files[header.file] = WeightFile(header.file, header.size_bytes)
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return cls(folder, config, tensors, files)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor `name` in its shape: a read-only view of the file, or a copy if
        the file misaligns it.

        Raises:
            KeyError: no such tensor.
            DataError: the file changed since its header was read.
        """
        info = self.tensors[name]
        return self._files[info.file].elements(info, 0, info.count).view(info.shape)

    def chunk(
        self, name: str, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read elements `start` to `stop` of the flattened tensor `name`, [stop - start], into
        `out` or new memory.

        If the file shrinks or the disk fails, a map ends the process, and a read raises an error.

        Cost: one copy, which stays in cache if `out` does; faster than mapping pages that are read
            only once.

        Raises:
            KeyError: no such tensor.
            DataError: the file cannot be read, or changed since its header was read.
        """
        info = self.tensors[name]
        return self._files[info.file].read(info, start, stop, out)

    def tensor_in_memory(self, name: str) -> torch.Tensor:
        """Read the whole tensor `name` in its shape into new memory; see `chunk`."""
        info = self.tensors[name]
        return self.chunk(name, 0, info.count).view(info.shape)

    @property
    def own(self) -> Checkpoint:
        """The checkpoint of which this is a view, or itself."""
        return self

    def own_name(self, name: str) -> str | None:
        """Return the name in the files of the tensor that `name` is, element by element; None if it
        is made of others."""
        return name if name in self.tensors else None

    def made_with(self, name: str) -> tuple[str, ...]:
        """Return the tensors that are read together with `name`, itself included: those that one
        conversion makes."""
        return (name,)

    def release(self, name: str) -> None:
        """Free what is held in memory to read `name`. Call it after reading a part of a tensor."""

    def check_unchanged(self, name: str) -> None:
        """Raise DataError if the file of tensor `name` changed since its header was read. Call it
        after reading."""
        self._files[self.tensors[name].file].check()

    def same_bits(self, one: str, other: str) -> bool:
        """Return whether two tensors have the same shape, dtype and bits.

        Cost: reads both, up to the first chunk in which they differ.
        """
        import torch

        a, b = self.tensors[one], self.tensors[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        cuts = [(start, min(start + _COMPARED, a.count)) for start in range(0, a.count, _COMPARED)]
        return all(
            torch.equal(
                self.chunk(one, *cut).view(torch.uint8), self.chunk(other, *cut).view(torch.uint8)
            )
            for cut in cuts
        )

    def check_all_unchanged(self) -> None:
        """Raise DataError if any weight file changed since its header was read."""
        for file in self._files.values():
            file.check()

    def file(self, name: str) -> WeightFile:
        """Return the open weight file that holds tensor `name`."""
        return self._files[self.tensors[name].file]

    def files(self) -> list[WeightFile]:
        """Return the open weight files, in file order."""
        return [self._files[path] for path in sorted(self._files)]

    def state(self) -> list[tuple[str | int, ...]]:
        """Return name, bytes, mtime and ctime (ns) and inode of every weight file, as they were
        when it was opened."""
        return [(file.path.name, *file.state, file.inode) for file in self.files()]

    def duplicate(self) -> Checkpoint:
        """Return the same checkpoint with descriptors of its own, to be closed separately."""
        return Checkpoint(
            self.folder,
            self.config,
            self.tensors,
            {path: file.duplicate() for path, file in self._files.items()},
        )

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same open files under other names; `names` maps each new name to the name
        here. Close this one, not the other."""
        tensors = {
            name: dataclasses.replace(self.tensors[key], name=name) for name, key in names.items()
        }
        return Checkpoint(self.folder, self.config, tensors, self._files)

    def quick_fingerprint(self) -> str:
        """Return 16 hex digits over every tensor's name, dtype, shape and 4 KiB of its bytes,
        independent of the sharding.

        Cost: reads at most 4 KiB per tensor.

        Raises:
            DataError: a file changed since its header was read.
        """
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(repr((name, info.dtype, info.shape)).encode())
            # each tensor is sampled at another offset: rows that fine-tuning never changes lie
            # together
            hashed = int.from_bytes(
                hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"
            )
            skip = hashed % max(info.nbytes - SAMPLE_BYTES + 1, 1)
            digest.update(
                self._files[info.file].sample(info.start + skip, min(info.nbytes, SAMPLE_BYTES))
            )
        self.check_all_unchanged()
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files. A map lives on as long as a view of it."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# --- view


class InMemory(Protocol):
    """Any holder of tensors by name, such as a checkpoint."""

    def tensor_in_memory(self, name: str) -> torch.Tensor: ...


class Conversion:
    """Tensors that are made together of tensors of a checkpoint, and held in memory while they are
    read.

    They are made when their first element is read. They are freed when all elements were read once,
    or when `release` was called for every name; a later read makes them anew.

    Args:
        own: the holder of `sources`.
        infos: name, dtype and shape of each tensor to make.
        make: function from tensors by the names of `sources` to tensors by the names of `infos`.

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
        self._remaining = 0
        self._released: set[str] = set()

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements `start` to `stop` of the flattened tensor `name`.

        Raises:
            PairError: the conversion cannot be undone for the requested layout.
            DataError: a file cannot be read, or changed.
        """
        with self._lock:
            if not self._held:
                tensors = {key: self._own.tensor_in_memory(key) for key in self.sources}
                self._held = {
                    key: tensor.contiguous().view(-1) for key, tensor in self._make(tensors).items()
                }
                self._remaining, self._released = self._count, set()
            elements = self._held[name][start:stop]
            self._remaining -= stop - start
            if self._remaining <= 0:
                self._held = {}
            return elements

    def release(self, name: str) -> None:
        """Note that no more of `name` will be read."""
        with self._lock:
            self._released.add(name)
            if self._released.issuperset(self.names):
                self._held = {}


class View(Checkpoint):
    """`own` under other names. Its fingerprints and file states are those of `own`.

    Args:
        names: name in this view → name in `own`.
        conversions: tensors that are made of those of `own`, in addition.
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
        elements = self._conversions[name].elements(name, start, stop)
        return elements if out is None else out.copy_(elements)

    def check_unchanged(self, name: str) -> None:
        for key in (
            self._conversions[name].sources if name in self._conversions else (self._names[name],)
        ):
            self._own.check_unchanged(key)

    def quick_fingerprint(self) -> str:
        return self._own.quick_fingerprint()

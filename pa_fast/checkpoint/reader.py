"""A checkpoint folder open for reading: headers at once, tensors as views of memory maps when asked
for.
"""

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

    A context manager. Views that were handed out stay valid after `close`; they are read only, and
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
        """Read config.json, the index and every shard header of the local `folder`. No tensor data,
        no torch.

        What reads its other files later, here or in transformers, meets no pipe.

        Raises:
            CheckpointError: any defect that headers show, with file, tensor, what was found and
                expected.
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
        """The whole tensor `name` in its shape: a read-only view of the file, or a copy where the
        file misaligns it.

        Raises:
            KeyError: no such tensor.
            DataError: the file changed since its header was read.
        """
        info = self.tensors[name]
        return self._files[info.file].elements(info, 0, info.count).view(info.shape)

    def chunk(
        self, name: str, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor `name`, [stop - start], read into
        `out` or new memory.

        A map would end the process where the file shrinks or the disk fails; a read ends in an
        error.

        Cost: one copy, which stays in cache if `out` does; faster than mapping pages that are
            looked at once.

        Raises:
            KeyError: no such tensor.
            DataError: the file cannot be read, or changed since its header was read.
        """
        info = self.tensors[name]
        return self._files[info.file].read(info, start, stop, out)

    def tensor_in_memory(self, name: str) -> torch.Tensor:
        """The whole tensor `name` in its shape, read into new memory; see `chunk`."""
        info = self.tensors[name]
        return self.chunk(name, 0, info.count).view(info.shape)

    @property
    def own(self) -> Checkpoint:
        """The checkpoint of which this is a view, or itself."""
        return self

    def own_name(self, name: str) -> str | None:
        """The tensor in the files that `name` is, element by element; None where it is made of
        others."""
        return name if name in self.tensors else None

    def made_with(self, name: str) -> tuple[str, ...]:
        """The tensors that are read together with `name`, itself among them: those that one
        conversion makes."""
        return (name,)

    def release(self, name: str) -> None:
        """Let go of what was kept in memory to read `name`: call it after reading a part of a
        tensor."""

    def check_unchanged(self, name: str) -> None:
        """Raise DataError if the file of tensor `name` changed since its header was read: call it
        after reading."""
        self._files[self.tensors[name].file].check()

    def same_bits(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bits.

        Cost: reads both, up to the first chunk in which they differ.
        """
        import torch

        a, b = self.tensors[one], self.tensors[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        cuts = [(at, min(at + _COMPARED, a.count)) for at in range(0, a.count, _COMPARED)]
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
        """The open weight file that holds tensor `name`."""
        return self._files[self.tensors[name].file]

    def files(self) -> list[WeightFile]:
        """The open weight files, in file order."""
        return [self._files[path] for path in sorted(self._files)]

    def state(self) -> list[tuple[str | int, ...]]:
        """Name, bytes, mtime and ctime (ns) and inode of every weight file, as they were when it
        was opened."""
        return [(file.path.name, *file.state, file.inode) for file in self.files()]

    def duplicate(self) -> Checkpoint:
        """The same checkpoint with descriptors of its own, to be closed by itself."""
        return Checkpoint(
            self.folder,
            self.config,
            self.tensors,
            {path: file.duplicate() for path, file in self._files.items()},
        )

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same open files with other names; `names` has the name here of each new one. Close
        this one, not the other."""
        tensors = {
            name: dataclasses.replace(self.tensors[key], name=name) for name, key in names.items()
        }
        return Checkpoint(self.folder, self.config, tensors, self._files)

    def quick_fingerprint(self) -> str:
        """16 hex digits over every tensor's name, dtype, shape and 4 KiB of its bytes; how it is
        sharded does not matter.

        Cost: reads at most 4 KiB per tensor.

        Raises:
            DataError: a file changed since its header was read.
        """
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(repr((name, info.dtype, info.shape)).encode())
            # each tensor is sampled elsewhere: rows of a matrix that fine-tuning never touches sit
            # in one place
            place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            skip = place % max(info.nbytes - SAMPLE_BYTES + 1, 1)
            digest.update(
                self._files[info.file].sample(info.start + skip, min(info.nbytes, SAMPLE_BYTES))
            )
        self.check_all_unchanged()
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files. Maps live on while a view of them does."""
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
#
# A checkpoint seen under other names, with tensors that transformers' conversions make of its
# own.


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

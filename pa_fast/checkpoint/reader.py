"""A checkpoint folder open for reading: headers at once, tensors as views of memory maps when asked
for."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import errno
import functools
import hashlib
import mmap
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.companions import check_regular
from pa_fast.checkpoint.document import read_object
from pa_fast.checkpoint.header import DTYPE_BITS, TensorInfo
from pa_fast.checkpoint.quantised import check_not_quantised
from pa_fast.checkpoint.shards import check_redirects, read_shards
from pa_fast.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import torch

SAMPLE_BYTES = 4096
_COMPARED = 2**20
MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module does not name it
_CHANGED_HINT = (
    "something writes to this checkpoint: wait until it is done, or copy the checkpoint, and run"
    " again"
)


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


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype string."""
    import torch

    names = {
        "BOOL": "bool",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
    }
    return getattr(torch, names.get(dtype) or dtype.replace("U", "uint").replace("I", "int"))


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, for reading into and writing from; valid while the
    tensor is."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


def page_in(view: torch.Tensor) -> None:
    """Map all pages of `view`, a view of a mapped file, in one call instead of one fault per page
    (4x faster to stream).

    Raises:
        OSError: EFAULT where the file no longer has these bytes; touching them would kill the
            process.
    """
    if sys.platform != "linux":
        return
    first = view.data_ptr() - view.data_ptr() % mmap.PAGESIZE
    # through ctypes, which lets other threads run meanwhile; mmap.madvise does not
    if _libc().madvise(
        ctypes.c_void_p(first),
        ctypes.c_size_t(view.data_ptr() + view.nbytes - first),
        MADV_POPULATE_READ,
    ):
        code = ctypes.get_errno()
        if code not in (
            errno.EINVAL,
            errno.ENOSYS,
        ):  # a kernel without it faults them in one by one
            raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _accept_read_only_views() -> None:
    """Spend torch's once-per-process warning about read-only buffers here, unseen: reading is all
    that is done to them."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"0", dtype=torch.uint8)


class WeightFile:
    """One open weight file: its descriptor pins the bytes even if the name is replaced
    meanwhile."""

    def __init__(self, path: Path, size_bytes: int):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened: {error.strerror}", "check its permissions"
            ) from None
        self._map: mmap.mmap | None = None
        self._mapping = threading.Lock()
        found = os.fstat(self._fd)
        self.device, self.inode, self._links = found.st_dev, found.st_ino, found.st_nlink
        self.state = (size_bytes, found.st_mtime_ns, found.st_ctime_ns)
        self.check()

    def check(self) -> None:
        """Raise DataError if the file changed since its header was read.

        A ctime that moved alone counts: whoever writes can put the mtime back. But it moves, too,
        when the file loses a name, as it does when another file replaces it: these bytes stay what
        they are.
        """
        found = os.fstat(self._fd)
        size, mtime, ctime = self.state
        if found.st_size != size:
            self.refuse(f"{found.st_size} bytes, expected {size}")
        if found.st_mtime_ns != mtime:
            self.refuse("written to")
        if found.st_ctime_ns != ctime and found.st_nlink >= self._links:
            self.refuse(
                "written to, or given other permissions: its ctime moved, and its mtime did not"
            )

    def refuse(self, what: str) -> None:
        """Raise the DataError of a file that changed."""
        raise DataError(f"{self.path}: the file changed while it was read: {what}", _CHANGED_HINT)

    def is_touched(self) -> bool:
        """Whether the ctime moved and nothing else that `check` looks at: only the bytes can tell
        what was done."""
        found = os.fstat(self._fd)
        return (found.st_size, found.st_mtime_ns) == self.state[
            :2
        ] and found.st_ctime_ns != self.state[2]

    def accept(self) -> None:
        """Go by the ctime that the file has now."""
        found = os.fstat(self._fd)
        self.state, self._links = (*self.state[:2], found.st_ctime_ns), found.st_nlink

    def check_name(self) -> None:
        """Raise DataError if `path` is not this file any more."""
        try:
            same = os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise DataError(f"{self.path}: the file was replaced while it was read", _CHANGED_HINT)

    def duplicate(self) -> WeightFile:
        """The same file with a descriptor of its own, to be closed by itself."""
        made = copy.copy(self)
        made._fd, made._map, made._mapping = os.dup(self._fd), None, threading.Lock()
        return made

    def elements(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor `info` of this file, mapped and paged
        in."""
        import torch

        self.check()
        dtype = torch_dtype(info.dtype)
        if stop == start:
            return torch.empty(0, dtype=dtype)
        size = DTYPE_BITS[info.dtype] // 8
        first = info.start + start * size
        raw = self.view(first, (stop - start) * size)
        return raw.clone().view(dtype) if first % size else raw.view(dtype)

    def view(self, start: int, count: int) -> torch.Tensor:
        """`count` bytes from byte `start`, uint8 [count], paged in."""
        import torch

        with self._mapping:
            if self._map is None:
                _accept_read_only_views()
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        try:
            found = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=start)
            page_in(found)
        except (OSError, ValueError) as error:  # ValueError: it shrank before it was mapped
            raise DataError(
                f"{self.path}: bytes {start} to {start + count} cannot be read: {error}",
                _CHANGED_HINT,
            ) from None
        return found

    def read(
        self, info: TensorInfo, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor `info` of this file, in memory; see
        `Checkpoint.chunk`."""
        import torch

        if out is None:
            out = torch.empty(stop - start, dtype=torch_dtype(info.dtype))
        at = info.start + start * DTYPE_BITS[info.dtype] // 8
        left = memory(out)
        while left:
            count = self._read(left, at)
            left, at = left[count:], at + count
        self.check()
        return out

    def sample(self, start: int, count: int) -> bytes:
        """`count` bytes from byte `start`."""
        found = bytearray(count)
        self._read(memoryview(found), start)
        return bytes(found)

    def _read(self, into: memoryview, start: int) -> int:
        """Read once, and something: how many bytes."""
        try:
            count = os.preadv(self._fd, [into], start)
        except OSError as error:
            hint = "check the disk and the file: download it again if the disk is well"
            raise DataError(
                f"{self.path}: bytes from {start} cannot be read: {error.strerror}", hint
            ) from None
        if into and not count:
            self.check()
            raise DataError(
                f"{self.path}: no bytes at {start}, expected {len(into)}", _CHANGED_HINT
            )
        return count

    def close(self) -> None:
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

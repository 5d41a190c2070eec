"""Untrusted files that a checkpoint consists of: JSON documents, safetensors headers, and the bytes
of tensors.

Each file is read whole or refused by name. A header is checked until every tensor's bytes are known
to lie in the file.
"""

from __future__ import annotations

import copy
import ctypes
import errno
import functools
import json
import math
import mmap
import os
import re
import shlex
import stat
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.errors import CheckpointError, DataError
from pa_fast.foreign import is_deep, one_line
from pa_fast.units import format_bytes

if TYPE_CHECKING:
    import torch


LIMIT_BYTES = 100_000_000  # what safetensors allows for a header; no config or index comes near it

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of a git-lfs pointer, which stands for a file that was not downloaded."""


def refuse_pointer(path: Path, data: bytes) -> None:
    """Raise CheckpointError if `data`, the beginning of the file `path`, is a git-lfs pointer.

    Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if data.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d{1,18})$", data[:1024], re.MULTILINE)
        stands = f" for a file of {format_bytes(int(size[1]))}" if size else ""
        raise CheckpointError(
            f"{path}: found a git-lfs pointer{stands}, not the file itself: the folder was cloned"
            " without git-lfs",
            f"install git-lfs, then: git -C {shlex.quote(str(path.parent))} lfs pull",
        )


def quoted(text: str) -> str:
    """Return `text` in backticks, printable and cut to 120 characters, so that a hostile name can
    neither flood nor colour a terminal."""
    return f"`{one_line(text, 120)}`"


def regular_size(path: Path) -> int:
    """Return the size in bytes of the regular file `path`. Links are followed, because a hub cache
    is made of them.

    Raises:
        CheckpointError: missing, a broken link, or not a regular file (a pipe would block for
            ever).
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}", "complete the download or check the path"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file", "replace it by the file itself")
    return status.st_size


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `data`, as UTF-8 and without duplicate keys at any depth.

    Args:
        where: the file, and the part of it, for messages.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deep, a key twice, or not an object.
    """
    hint = "download the file again"
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}", hint) from None
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep to be a checkpoint's", hint) from None
    except _Duplicate as error:
        raise CheckpointError(
            f"{where}: the name {quoted(error.args[0])} appears twice in one JSON object", hint
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}", hint) from None
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{where}: found JSON {type(document).__name__}, expected an object", hint
        )
    if is_deep(document):  # whoever walks or prints it recurses, and the parser goes deeper
        raise CheckpointError(f"{where}: JSON nested too deep to be a checkpoint's", hint)
    return document


def read_object(path: Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """Read the JSON object in the file `path`.

    Raises:
        CheckpointError: missing, larger than `limit_bytes`, or not a plain JSON object.
    """
    size = regular_size(path)
    if size > limit_bytes:
        raise CheckpointError(
            f"{path}: {size} bytes, expected at most {limit_bytes}",
            "this is not a checkpoint's JSON file",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", "check its permissions"
        ) from None
    refuse_pointer(path, data)
    return parse_object(data, str(path))


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise _Duplicate(name)
        entries[name] = value
    return entries


# --- header
#
#     8 bytes   little-endian header length H
#     H bytes   JSON: name -> {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__"
#     the rest  tensor data, row-major; offsets count from its first byte, without gap or overlap
# Source: https://github.com/huggingface/safetensors (format section)

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
# the dtypes that are merged; every other must be equal on both sides
FLOATS = frozenset({"BF16", "F16", "F32"})
MAX_DIMENSIONS = 32
_AGAIN = "the file is damaged or was not written by safetensors: download or convert it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: bytes `start` to `stop`, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """All tensors of the file `file` by name, in the order of their bytes, the size that was
    checked, and the metadata."""

    file: Path
    tensors: dict[str, TensorInfo]
    size_bytes: int
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of `path`. No tensor data are read.

    Raises:
        CheckpointError: naming the file, the tensor, what was found and what was expected.
    """
    size = regular_size(path)
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors header", _AGAIN)
    try:
        with open(path, "rb", buffering=0) as file:  # not a byte past the header
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > LIMIT_BYTES and start == LFS_POINTER[:8]:
                refuse_pointer(path, start + file.read(1024))
            if length > LIMIT_BYTES:
                raise CheckpointError(
                    f"{path}: header length {length}, expected at most {LIMIT_BYTES}", _AGAIN
                )
            if 8 + length > size:
                defect = f"header of {length} bytes overruns the file of {size} bytes"
                raise CheckpointError(f"{path}: {defect}, expected at least {8 + length}", _AGAIN)
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", "check its permissions"
        ) from None
    if not data.lstrip(b" \t\r\n").startswith(b"{"):
        raise CheckpointError(f"{path}: header begins with {data[:1]!r}, expected `{{`", _AGAIN)
    entries = parse_object(data, f"{path}: header")
    metadata = entries.pop("__metadata__", None) or {}  # null, as safetensors itself reads it
    _check_metadata(path, metadata)
    infos = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_tiling(path, infos, 8 + length, size)
    return Header(path, {info.name: info for info in infos}, size, metadata)


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: `__metadata__` is not an object of strings", _AGAIN)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def refuse(defect: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {quoted(name)}: {defect}", _AGAIN)

    if not name.isprintable():
        raise refuse("the name has characters that cannot be printed")
    if not isinstance(entry, dict) or not entry.keys() >= {
        "dtype",
        "shape",
        "data_offsets",
    }:
        # others mean nothing
        raise refuse("entry is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {quoted(str(dtype))}, expected one of {', '.join(DTYPE_BITS)}")
    if (
        not isinstance(shape, list)
        or not all(_is_size(n) for n in shape)
        or len(shape) > MAX_DIMENSIONS
    ):
        raise refuse(
            f"shape {quoted(str(shape))}, expected at most {MAX_DIMENSIONS} sizes from 0 to"
            " 2^63 - 1"
        )
    if math.prod(max(n, 1) for n in shape) >= 2**63:
        raise refuse(f"shape {quoted(str(shape))} has more elements than any file can hold")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(n) for n in offsets)
        or offsets[0] > offsets[1]
    ):
        raise refuse(
            f"data_offsets {quoted(str(offsets))}, expected [start, stop] with 0 <= start <= stop"
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        expected = f"expected {bits / 8:g} for shape {shape} of {dtype}"
        raise refuse(f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, {expected}")
    return TensorInfo(
        name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1]
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_tiling(path: Path, infos: list[TensorInfo], data_start: int, size: int) -> None:
    offset = data_start
    for info in infos:
        if info.start != offset:
            kind = (
                "overlaps the tensor before it" if info.start < offset else "leaves a gap before it"
            )
            defect = f"data starts at byte {info.start}, expected {offset}: it {kind}"
            raise CheckpointError(f"{path}: tensor {quoted(info.name)}: {defect}", _AGAIN)
        offset = info.stop
    if offset > size:
        last = quoted(infos[-1].name)
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, expected {offset} (tensor {last} ends there)", _AGAIN
        )
    if offset < size:
        raise CheckpointError(
            f"{path}: {size} bytes, expected {offset}: {size - offset} bytes belong to no tensor",
            _AGAIN,
        )


# --- weight file

MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module does not name it
_CHANGED_HINT = (
    "something writes to this checkpoint: wait until it is done, or copy the checkpoint, and run"
    " again"
)


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype string."""
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
    """Return the bytes of a contiguous CPU tensor, to read into and to write from. They are valid
    as long as the tensor is."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


def page_in(view: torch.Tensor) -> None:
    """Map all pages of `view`, a view of a mapped file, in one call instead of by one fault per
    page (4x faster to stream).

    Raises:
        OSError: EFAULT if the file no longer has these bytes. To touch them would kill the
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
        ):
            # a kernel without it faults them in one by one
            raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _accept_read_only_views() -> None:
    """Trigger torch's once-per-process warning about read-only buffers here, where it is hidden:
    these buffers are only read."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"0", dtype=torch.uint8)


class WeightFile:
    """One open weight file. Its descriptor pins the bytes even if the name is replaced
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
        status = os.fstat(self._fd)
        self.device, self.inode, self._links = status.st_dev, status.st_ino, status.st_nlink
        self.state = (size_bytes, status.st_mtime_ns, status.st_ctime_ns)
        self.check()

    def check(self) -> None:
        """Raise DataError if the file changed since its header was read.

        A changed ctime counts even if the mtime did not change, because a writer can set the mtime
        back. But a file that loses a name, as when another file replaces it, gets a new ctime too;
        its bytes are the same, so that is accepted.
        """
        status = os.fstat(self._fd)
        size, mtime, ctime = self.state
        if status.st_size != size:
            self.refuse(f"{status.st_size} bytes, expected {size}")
        if status.st_mtime_ns != mtime:
            self.refuse("written to")
        if status.st_ctime_ns != ctime and status.st_nlink >= self._links:
            self.refuse(
                "written to, or given other permissions: its ctime moved, and its mtime did not"
            )

    def refuse(self, what: str) -> None:
        """Raise the DataError of a file that changed."""
        raise DataError(f"{self.path}: the file changed while it was read: {what}", _CHANGED_HINT)

    def is_touched(self) -> bool:
        """Return whether the ctime changed, but not the size or the mtime. Only the bytes can then
        tell whether the file was written to."""
        status = os.fstat(self._fd)
        return (status.st_size, status.st_mtime_ns) == self.state[
            :2
        ] and status.st_ctime_ns != self.state[2]

    def accept(self) -> None:
        """Take the file's present ctime as the expected one."""
        status = os.fstat(self._fd)
        self.state, self._links = (*self.state[:2], status.st_ctime_ns), status.st_nlink

    def check_name(self) -> None:
        """Raise DataError if `path` no longer names this file."""
        try:
            same = os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise DataError(f"{self.path}: the file was replaced while it was read", _CHANGED_HINT)

    def duplicate(self) -> WeightFile:
        """Return the same file with a descriptor of its own, to be closed separately."""
        twin = copy.copy(self)
        twin._fd, twin._map, twin._mapping = os.dup(self._fd), None, threading.Lock()
        return twin

    def elements(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Return elements `start` to `stop` of the flattened tensor `info` of this file, mapped and
        paged in."""
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
        """Return `count` bytes from byte `start` on as uint8 [count], paged in."""
        import torch

        with self._mapping:
            if self._map is None:
                _accept_read_only_views()
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        try:
            data = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=start)
            page_in(data)
        except (OSError, ValueError) as error:  # ValueError: it shrank before it was mapped
            raise DataError(
                f"{self.path}: bytes {start} to {start + count} cannot be read: {error}",
                _CHANGED_HINT,
            ) from None
        return data

    def read(
        self, info: TensorInfo, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read elements `start` to `stop` of the flattened tensor `info` of this file into memory;
        see `Checkpoint.chunk`."""
        import torch

        if out is None:
            out = torch.empty(stop - start, dtype=torch_dtype(info.dtype))
        offset = info.start + start * DTYPE_BITS[info.dtype] // 8
        remaining = memory(out)
        while remaining:
            count = self._read(remaining, offset)
            remaining, offset = remaining[count:], offset + count
        self.check()
        return out

    def sample(self, start: int, count: int) -> bytes:
        """Read `count` bytes from byte `start` on."""
        data = bytearray(count)
        self._read(memoryview(data), start)
        return bytes(data)

    def _read(self, into: memoryview, start: int) -> int:
        """Read at least one byte into `into` by one call, and return the number of bytes."""
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

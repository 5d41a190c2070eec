"""The header of one safetensors file, checked until every tensor's bytes are known to lie in the
file.

    8 bytes   little-endian header length H
    H bytes   JSON: name -> {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__"
    the rest  tensor data, row-major; offsets count from its first byte, without gap or overlap

Source: https://github.com/huggingface/safetensors (format section); the attacks it lists are
tests/attacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.document import (
    LFS_POINTER,
    LIMIT_BYTES,
    parse_object,
    quoted,
    refuse_pointer,
    regular_size,
)
from pa_fast.errors import CheckpointError

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
FLOATS = frozenset(
    {"BF16", "F16", "F32"}
)  # the dtypes that are merged; every other must be equal on both sides
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
        """Elements."""
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
    """Read and check the header of `path`; no tensor data are read.

    Raises:
        CheckpointError: the file, tensor, what was found and what was expected.
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
                found = f"header of {length} bytes overruns the file of {size} bytes"
                raise CheckpointError(f"{path}: {found}, expected at least {8 + length}", _AGAIN)
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
    def refuse(found: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {quoted(name)}: {found}", _AGAIN)

    if not name.isprintable():
        raise refuse("the name has characters that cannot be printed")
    if not isinstance(entry, dict) or not entry.keys() >= {
        "dtype",
        "shape",
        "data_offsets",
    }:  # others mean nothing
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
    at = data_start
    for info in infos:
        if info.start != at:
            kind = "overlaps the tensor before it" if info.start < at else "leaves a gap before it"
            found = f"data starts at byte {info.start}, expected {at}: it {kind}"
            raise CheckpointError(f"{path}: tensor {quoted(info.name)}: {found}", _AGAIN)
        at = info.stop
    if at > size:
        last = quoted(infos[-1].name)
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, expected {at} (tensor {last} ends there)", _AGAIN
        )
    if at < size:
        raise CheckpointError(
            f"{path}: {size} bytes, expected {at}: {size - at} bytes belong to no tensor", _AGAIN
        )

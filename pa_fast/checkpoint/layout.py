"""How tensors are cut into output shards, and the header bytes of each: known before the first
tensor is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pa_fast.checkpoint.header import DTYPE_BITS
from pa_fast.checkpoint.shards import SINGLE

# the header is padded so that data start on a cache line, and tensors stay aligned to their dtype
_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in an output file: bytes `start` to `stop` from the beginning of the
    file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its name, header bytes (length word included) and tensors in byte order."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def size_bytes(self) -> int:
        return self.slots[-1].stop if self.slots else len(self.header)


Row = tuple[str, str, tuple[int, ...], int]
"""Name, safetensors dtype, shape and elements of a tensor."""


def plan_shards(tensors: Iterable[Row], max_shard_bytes: int) -> list[ShardPlan]:
    """Cut (name, dtype, shape, elements) into files of at most `max_shard_bytes` of data, keeping
    the order.

    A tensor larger than that gets a file of its own. Inside a file wider dtypes come first, so that
    all are aligned.
    """
    groups: list[list[Row]] = [[]]
    filled = 0
    for row in tensors:
        size = _size(row)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += size
    return _numbered(groups)


def plan_shards_like(tensors: Iterable[Row], files: Mapping[str, int]) -> list[ShardPlan]:
    """Cut tensors as another checkpoint is: `files` has the place of each tensor's file in it. One
    that it lacks goes last.

    Inside a file wider dtypes come first, so that all are aligned; then the order is that of
    `tensors`.
    """
    last = max(files.values())
    groups: dict[int, list[Row]] = {}
    for row in tensors:
        groups.setdefault(files.get(row[0], last), []).append(row)
    return _numbered([groups[place] for place in sorted(groups)])


def _size(row: Row) -> int:
    return row[3] * DTYPE_BITS[row[1]] // 8


def _numbered(groups: list[list[Row]]) -> list[ShardPlan]:
    total = len(groups)
    names = (
        [SINGLE]
        if total == 1
        else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    )
    return [_plan(file, group) for file, group in zip(names, groups)]


def _plan(file: str, group: list[Row]) -> ShardPlan:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(group, key=lambda tensor: -DTYPE_BITS[tensor[1]])
    at = 0
    for name, dtype, shape, count in ordered:
        size = count * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    slots, at = [], len(header)
    for name, dtype, shape, count in ordered:
        size = count * DTYPE_BITS[dtype] // 8
        slots.append(Slot(name, dtype, shape, at, at + size))
        at += size
    return ShardPlan(file, header, tuple(slots))

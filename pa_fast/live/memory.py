"""Memory of live weights: its allocation, what they take by where it lies, and what is free."""

from __future__ import annotations

import bisect
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_ALIGNMENT = 64  # a cache line, as torch aligns its own


def empty_live(like: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return an uninitialised contiguous tensor on `device` for each tensor of `like`, of its shape
    and dtype, as live weights are allocated: on a CPU all of them in one piece of memory.

    Each tensor has a storage of its own that ends with it, so that nothing takes them for tied, and
    saving one writes no other. The piece is freed with the last of them.

    Cost: at most 64 bytes a tensor more than it holds. `python -m bench -k lerp` times switches of
    tensors that lie together, and of others. Huge pages are not asked for: where memory is in
    fragments, making them takes longer than all the rest of loading.
    """
    import torch

    if device.type != "cpu":
        return [torch.empty(one.shape, dtype=one.dtype, device=device) for one in like]
    starts, size = [], 0
    for tensor in like:
        starts.append(size)
        size += -(-nbytes(tensor) // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(size, dtype=torch.uint8, device=device)
    held = block.numpy()

    def part(tensor: torch.Tensor, start: int) -> torch.Tensor:
        count = nbytes(tensor)
        if not count:  # `frombuffer` refuses it
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        part = torch.frombuffer(held, dtype=torch.uint8, count=count, offset=start)
        return part.view(tensor.dtype).view(tensor.shape)

    return [part(tensor, start) for tensor, start in zip(like, starts)]


@dataclass(frozen=True)
class Memory:
    """Bytes of the live copy, and of what a store keeps beside it on the device, on the host and in
    page cache.

    Fields can be read as attributes or by name: `memory.live_bytes`, `memory["live_bytes"]`.

    Example:
        memory = weights.memory()
        print(f"{memory.total_bytes / 2**30:.1f} GiB, {memory.live_bytes / 2**30:.1f} of them live")
    """

    live_bytes: int
    device_bytes: int
    host_bytes: int
    mapped_bytes: int

    @property
    def total_bytes(self) -> int:
        """Live + device + host. Memory maps of files are counted apart: the kernel can drop
        them."""
        return self.live_bytes + self.device_bytes + self.host_bytes

    def keys(self) -> list[str]:
        """Names that `memory[name]` takes."""
        return [*asdict(self), "total_bytes"]

    def __getitem__(self, name: str) -> int:
        if name not in self.keys():
            raise KeyError(name)
        return int(getattr(self, name))


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of `tensor`'s elements."""
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class FilePosition:
    """A byte of a file: the file's device, inode and path as the kernel lists them, and the byte's
    offset."""

    device: int
    inode: int
    path: str
    offset: int


_MAPPED = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([1-9][0-9]*) +(/.*)$",
    re.MULTILINE,
)
"""A line of `/proc/self/maps` that has a file: first address, the one after the last, mode, offset,
device, inode, path. Lines are in the order of their addresses."""


class FileMaps:
    """Address ranges of this process that map files read-only or privately, as the kernel lists
    them.

    PyTorch does not say whether a CPU tensor lies in a memory map; `/proc/self/maps` does.
    Elsewhere than on Linux nothing counts as mapped.
    """

    def __init__(self) -> None:
        listed = b""
        if sys.platform == "linux":
            with open("/proc/self/maps", "rb") as lines:
                listed = lines.read()
        # read when asked for: a process has thousands of them, and few hold tensors
        self._maps = list(_MAPPED.finditer(listed))
        self._starts = [int(line[1], 16) for line in self._maps]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor`'s first byte lies in a mapped file."""
        return self.position(tensor) is not None

    def position(self, tensor: torch.Tensor) -> FilePosition | None:
        """Return the file position of the first byte of `tensor`, which is on a CPU; None where it
        lies in no file."""
        address = tensor.data_ptr()
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        stop, offset, major, minor = (int(part, 16) for part in self._maps[index].group(2, 3, 4, 5))
        if address >= stop:
            return None
        inode, path = self._maps[index].group(6, 7)
        return FilePosition(
            os.makedev(major, minor),
            int(inode),
            path.decode(errors="replace"),
            offset + address - self._starts[index],
        )


def measure(live: Iterable[torch.Tensor], beside: Iterable[torch.Tensor]) -> Memory:
    """Return the bytes of `live` and `beside`, each tensor of `beside` counted once."""
    maps = FileMaps()
    device = host = mapped = 0
    for tensor in {(t.device, t.data_ptr()): t for t in beside}.values():
        if tensor.device.type != "cpu":
            device += nbytes(tensor)
        elif maps.holds(tensor):
            mapped += nbytes(tensor)
        else:
            host += nbytes(tensor)
    return Memory(sum(nbytes(t) for t in live), device, host, mapped)


# --- free memory

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class FreeMemory:
    """Memory of the device or machine that holds live tensors and deltas.

    Attributes:
        free_bytes: what is free.
        total_bytes: all of it.
        on_host: whether it is the machine's own, where sources may stay memory maps of files.
    """

    free_bytes: int
    total_bytes: int
    on_host: bool = False

    @classmethod
    def of(cls, device: torch.device) -> FreeMemory | None:
        """Return that of a GPU, or of the machine; None where the system does not say."""
        import torch

        if device.type == "cuda":
            return cls(*torch.cuda.mem_get_info(device))
        free = available_bytes()
        return None if free is None else cls(free, free, on_host=True)


def available_bytes() -> int | None:
    """Return the bytes that this process can still take without swapping: the machine's, or its
    container's where that is less. None elsewhere than on Linux.

    Page cache counts as free, since the kernel can drop it.
    """
    machine = _fields(_PROC / "meminfo").get("MemAvailable:")
    if machine is None:
        return None
    return max(0, min([machine * 1024, *_container()]))


def _container() -> list[int]:
    """Return the bytes that are free in this process's control group (version 2 or 1), or an empty
    list where it has no limit."""
    try:
        groups = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    free_bytes = []
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, limit, used, cache = _GROUPS, "memory.max", "memory.current", "file"
        elif "memory" in kinds.split(","):
            root, limit, used, cache = (
                _GROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_cache",
            )
        else:
            continue
        for folder in (root / path.lstrip("/"), root):
            # inside a container the path may be the host's
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                free_bytes.append(most - taken + _fields(folder / "memory.stat").get(cache, 0))
                break
    return free_bytes


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(file: Path) -> dict[str, int]:
    """Return name → number, of each line that begins with both."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}

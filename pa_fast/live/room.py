"""How much memory there is: of a device, and of this process's machine or container."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """Memory in which live tensors and deltas lie: free and in all, bytes.

    Attributes:
        on_host: whether it is the machine's own, where sources may stay memory maps of files.
    """

    free_bytes: int
    total_bytes: int
    on_host: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Room | None:
        """That of a GPU, or of the machine; None where the system does not say."""
        import torch

        if device.type == "cuda":
            return cls(*torch.cuda.mem_get_info(device))
        free = available_bytes()
        return None if free is None else cls(free, free, on_host=True)


def available_bytes() -> int | None:
    """Memory that this process can still take without swapping: the machine's, or its container's
    where that is less.

    Page cache counts as free, since the kernel drops it. None elsewhere than on Linux.
    """
    machine = _fields(_PROC / "meminfo").get("MemAvailable:")
    if machine is None:
        return None
    return max(0, min([machine * 1024, *_container()]))


def _container() -> list[int]:
    """What the memory group of this process, by version 2 or 1 of the interface, leaves it; nothing
    where there is no limit."""
    try:
        groups = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
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
        for folder in (
            root / path.lstrip("/"),
            root,
        ):
            # inside a container the path may be the host's
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                left.append(most - taken + _fields(folder / "memory.stat").get(cache, 0))
                break
    return left


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(file: Path) -> dict[str, int]:
    """Name → number of each line that begins with the two."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}

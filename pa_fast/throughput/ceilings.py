"""What the machine can do at all: copies, and streams of two reads and a write over flat memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from pa_kernels import Lerp

from pa_fast.throughput import Timing
from pa_fast.throughput.turns import seconds

_FILE_BYTES = 1 << 28


def ceilings(
    live: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], rounds: int
) -> Iterator[Timing]:
    """Over as many bytes as the largest tensor has; on a GPU the bus from pinned memory too, on a
    CPU the copy of a file.

    Cost: a copy of the largest tensor; of a file, at most 0.5 GB in the temporary folder for a
    moment.
    """
    name = max(base, key=lambda name: base[name].numel())
    b, w = base[name].view(-1), live[name].view(-1)
    other = b.clone()
    ours = Lerp([w], [b], [other])
    ours.run_(0.3)
    moved = {
        "copy": 2 * b.nbytes,
        **dict.fromkeys(
            ("flat torch.add(out=)", "flat torch.lerp(out=)", "flat switch"), 3 * b.nbytes
        ),
    }
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: w.copy_(b),
        "flat torch.add(out=)": lambda: torch.add(b, other, out=w),
        "flat torch.lerp(out=)": lambda: torch.lerp(b, other, 0.3, out=w),
        "flat switch": ours.launch_,
    }
    with tempfile.TemporaryDirectory() as folder:
        if b.is_cuda:
            host = b.cpu().pin_memory()
            moved["pinned host → device"] = b.nbytes
            ways["pinned host → device"] = lambda: w.copy_(host, non_blocking=True)
        else:
            source, copy = Path(folder) / "a", Path(folder) / "b"
            size = min(_FILE_BYTES, b.nbytes)
            source.write_bytes(b.view(torch.uint8)[:size].numpy().tobytes())
            moved["file copy"] = 2 * size
            ways["file copy"] = lambda: shutil.copyfile(source, copy)
        took = seconds(ways, 2 * rounds)
    for what in ways:
        yield Timing(what, None, None, moved[what], took[what], 2 * rounds)

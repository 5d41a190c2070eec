"""Ceilings of the machine: copies, and streams of two reads and a write over flat memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from pa_kernels import Lerp

from pa_fast.throughput.harness import Table, Way, timed

_FILE_BYTES = 1 << 28


def ceilings(
    live: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], rounds: int
) -> Table:
    """Time them over as many bytes as the largest tensor has; on a GPU the bus from pinned memory
    too, on a CPU the copy of a file.

    Cost: a copy of the largest tensor; of a file, at most 0.5 GB in the temporary folder for a
    moment.
    """
    name = max(base, key=lambda name: base[name].numel())
    b, w = base[name].view(-1), live[name].view(-1)
    other = b.clone()
    ours = Lerp([w], [b], [other])
    ours.run_(0.3)
    three = 3 * b.nbytes
    ways = [
        Way("copy", lambda: w.copy_(b), moved_bytes=2 * b.nbytes),
        Way("flat torch.add(out=)", lambda: torch.add(b, other, out=w), moved_bytes=three),
        Way("flat torch.lerp(out=)", lambda: torch.lerp(b, other, 0.3, out=w), moved_bytes=three),
        Way("flat switch", ours.launch_, moved_bytes=three),
    ]
    with tempfile.TemporaryDirectory() as folder:
        if b.is_cuda:
            host = b.cpu().pin_memory()

            def from_host() -> None:
                w.copy_(host, non_blocking=True)

            ways.append(Way("pinned host → device", from_host, moved_bytes=b.nbytes))
        else:
            source, copy = Path(folder) / "a", Path(folder) / "b"
            size = min(_FILE_BYTES, b.nbytes)
            source.write_bytes(b.view(torch.uint8)[:size].numpy().tobytes())

            def of_file() -> None:
                shutil.copyfile(source, copy)

            ways.append(Way("file copy", of_file, moved_bytes=2 * size))
        measured = timed(ways, 2 * rounds)
    return Table("", "ceilings", tuple(measured.values()), "copy")

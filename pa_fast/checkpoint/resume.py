"""Which shards of an unfinished folder are complete, so that another run of the same job need not
write them again.

    .pa_fast.shards.jsonl in the partial folder, one line per complete shard, synced after it:
    {"job": "…", "file": "model-00001-of-00003.safetensors",
     "tensors": {name: [written, base, instruct]}}

The three numbers are checksums (`pa_kernels.checksum`) as hex: of the bytes written, by which the
shard is verified, and of both sources, from which the content fingerprints are made without reading
them again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pa_fast import files
from pa_fast.checkpoint.fingerprint import as_hex
from pa_fast.checkpoint.header import TensorInfo
from pa_fast.checkpoint.layout import ShardPlan
from pa_fast.checkpoint.reader import WeightFile, torch_dtype
from pa_fast.checkpoint.streaming import cuts, in_order
from pa_fast.errors import OutputError, PaFastError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sums:
    """Checksums of one tensor: as written, and of what either side holds."""

    written: int
    base: int
    instruct: int


class ShardLog:
    """The complete shards in `folder` of the job `job`, whatever its form: only equal ones go on
    from each other."""

    def __init__(self, folder: Path, job: str):
        self.file = folder / ".pa_fast.shards.jsonl"
        self._job = job

    def begin(self) -> None:
        """Create the file, empty: by it the next run knows the folder as one of this tool's."""
        os.close(files.open_own(self.file, os.O_WRONLY | os.O_CREAT))

    def read(self) -> dict[str, dict[str, Sums]]:
        """File → checksums by tensor. A line that a kill tore, or of another job, counts for
        nothing."""
        try:
            lines = files.read_own(self.file).splitlines()
        except (OSError, OutputError):
            return {}
        found = {}
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["job"] == self._job:
                    found[str(entry["file"])] = {
                        str(name): Sums(*(int(value, 16) for value in sums))
                        for name, sums in entry["tensors"].items()
                    }
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
        return found

    def add(self, shard: str, sums: Mapping[str, Sums]) -> None:
        """Say that `shard`, which is on the disk under its name, is complete."""
        tensors = {
            name: [as_hex(one.written), as_hex(one.base), as_hex(one.instruct)]
            for name, one in sums.items()
        }
        line = json.dumps({"job": self._job, "file": shard, "tensors": tensors})
        with os.fdopen(
            files.open_own(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab"
        ) as file:
            # begins with a line break: a torn line before it must not swallow it
            file.write(f"\n{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def is_complete(
    pool: ThreadPoolExecutor, path: Path, plan: ShardPlan, sums: Mapping[str, Sums]
) -> bool:
    """Whether `path` has the size, the header and every byte that `plan` and `sums` say.

    Cost: one pass over the file.
    """
    from pa_kernels.cores import Scratch

    if sums.keys() != {slot.name for slot in plan.slots}:
        return False
    infos = {
        s.name: TensorInfo(s.name, s.dtype, s.shape, path, s.start, s.stop) for s in plan.slots
    }
    scratch = Scratch()
    try:
        file = WeightFile(path, plan.size_bytes)
        try:

            def one(name: str, start: int, stop: int) -> int:
                info = infos[name]
                out = scratch.take("out", stop - start, torch_dtype(info.dtype))
                return chunk_sum(file.read(info, start, stop, out), start)

            if file.sample(0, len(plan.header)) != plan.header:
                return False
            found = dict.fromkeys(infos, 0)
            pieces = ((name, *cut) for name, info in infos.items() for cut in cuts(info.count))
            for name, value in in_order(pool, one, pieces):
                found[name] += value
        finally:
            file.close()
    except PaFastError:
        return False
    return all(found[name] % 2**64 == one.written for name, one in sums.items())


def chunk_sum(chunk: torch.Tensor, start: int) -> int:
    """What elements from `start` on add to the checksum of their tensor, mod 2^64."""
    from pa_kernels.checksum import CHUNK_BYTES, piece_checksum

    return piece_checksum(chunk, start * chunk.element_size() // CHUNK_BYTES)

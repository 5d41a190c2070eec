"""The checksum that proves a switch, against torch's sum of the same words in one flat piece."""

from __future__ import annotations

import torch
from pa_kernels import checksum as checksum_of
from pa_kernels import reference

from bench.cases import OPS
from bench.pairs import FlatPair
from bench.run import Run
from pa_fast.throughput.harness import Way, require_bits

CASE = OPS["checksum"]


def checksum(run: Run) -> None:
    pair = FlatPair.drawn(CASE.size, *CASE.dtypes)
    tensors, words = pair.base, pair.b.view(torch.int64)
    require_bits(checksum_of(tensors[1:2]) == [reference.checksum(tensors[1])], "checksum")
    moved = pair.nbytes
    ours = Way("pa_kernels.checksum", lambda: checksum_of(tensors), moved_bytes=moved)
    ways = CASE.time(
        Way("sum of the words as int64", words.sum, moved_bytes=moved), ours, ours.repeated
    )
    run.record(
        CASE.target,
        f"checksum of {pair}",
        ways.values(),
        "sum of the words as int64",
        headline=f"{ways[ours.name].gbps:.1f} GB/s",
    )

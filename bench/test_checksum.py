"""The checksum that proves a switch, against torch's sum of the same words in one flat piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pa_kernels import checksum, reference

from bench.cases import OPS
from bench.table import record, timed
from bench.weights import Weights

CASE = OPS["checksum"]


def test_checksum(benchmark: Any) -> None:
    weights = Weights.drawn(CASE.size, *CASE.dtypes)
    tensors, words = weights.split(weights.base), weights.base.view(torch.int64)
    assert checksum(tensors[1:2]) == [reference.checksum(tensors[1])], "wrong sum: no speed"
    ways: dict[str, Callable[[], object]] = {
        "sum of the words as int64": words.sum,
        "pa_kernels.checksum": lambda: checksum(tensors),
        "pa_kernels.checksum, again": lambda: checksum(tensors),
    }
    floor, ours, again = timed(ways, CASE.rounds_here, dict.fromkeys(ways, weights.base.nbytes))
    record(
        benchmark,
        CASE.target,
        f"checksum of {weights}",
        [floor, ours, again],
        against=floor.name,
        noise=(ours.name, again.name),
        headline=f"{ours.gbps:.1f} GB/s",
    )

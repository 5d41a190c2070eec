"""From two folders to the first λ (P9), against reading both checkpoints once into memory; warm cache, interleaved.

`PA_FAST_BENCH_SIZE=1b make bench` for the README's figure (4 GB of disk, 7 GB of memory); 300m by default.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from pa_kernels.cores import over_cores

import pa_fast
from bench.process import Run, here, middle
from bench.synthetic import write_pair
from pa_fast.checkpoint.reader import Checkpoint, torch_dtype
from pa_fast.checkpoint.streaming import cuts

ROUNDS = int(os.environ.get("PA_FAST_BENCH_ROUNDS", "5"))


def test_load(benchmark: Any, capsys: Any, tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, os.environ.get("PA_FAST_BENCH_SIZE", "300m"))

    def read() -> None:
        for folder in (base, instruct):
            with Checkpoint.open(folder) as side:
                read_into_memory(side)

    def load(**options: Any) -> None:
        lm = pa_fast.load(base, instruct, device="cpu", **options)
        lm.set_lambda(0.3)
        lm.close()

    ways: dict[str, Callable[[], object]] = {
        "read both": read,
        "read again": read,
        "load to first λ": load,
        "without the endpoint check": lambda: load(endpoint_check=False),
    }
    load()
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            runs[name].append(here(work))
    with capsys.disabled():
        print(f"\nload, {ROUNDS} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}")
        floor = middle(runs["read both"])
        for name, values in runs.items():
            found = middle(values)
            benchmark.extra_info[name] = vars(found)
            print(
                f"  {name:27}{found.wall_s:7.2f} s {found.wall_s / floor.wall_s:6.2f} ×{found.cpu_s:8.2f} s of processor "
                f"{found.cpu_s / floor.cpu_s:6.2f} ×"
            )
    benchmark.pedantic(load, rounds=1)


def read_into_memory(side: Checkpoint) -> None:
    held = {name: torch.empty(info.count, dtype=torch_dtype(info.dtype)) for name, info in side.tensors.items()}
    pieces = [(name, *cut) for name, info in side.tensors.items() for cut in cuts(info.count)]
    over_cores(lambda at: side.chunk(*at, held[at[0]][at[1] : at[2]]), pieces)

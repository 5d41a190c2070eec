"""λ-parallel workers on Ray against one process: a single-threaded evaluator, time of the points alone and of the whole."""

from __future__ import annotations

import functools
import itertools
import pathlib
import time
from typing import Any

import pytest

import pa_fast
from pa_fast.launch import ray as launcher
from pa_fast.sweep import journal
from pa_fast.sweep.progress import Silent
from tests.launch import made

ROUNDS, WORK, LAMBDAS = 3, 8_000_000, "0:1:0.05"


class Clock(Silent):
    """When the first worker was ready, and when the last point was recorded."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def begin(self, points: int, finished: int) -> None:
        self.began = time.perf_counter()

    def recorded(self, entry: Any) -> None:
        self.ended = time.perf_counter()


def test_workers(benchmark: Any, capsys: Any, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("ray")
    make = functools.partial(made.busy, WORK)
    number = itertools.count()

    def run(workers: int) -> float:
        out, clock = tmp_path / str(next(number)), Clock()
        if workers == 1:
            pa_fast.sweep(*_swapped(make), out, progress=clock, figure=False)
        else:
            launcher.sweep(make, LAMBDAS, out, workers, progress=clock, figure=False)
        assert len(journal.read(out)) == 21
        return clock.ended - clock.began

    seconds: dict[str, list[float]] = {"one process": [], "2 workers": [], "one process again": []}
    for _ in range(ROUNDS):
        for name, workers in (("one process", 1), ("2 workers", 2), ("one process again", 1)):
            seconds[name].append(run(workers))
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    with capsys.disabled():
        print("\n21 λ with a single-threaded evaluator, from the first worker's start to the last point:")
        for name, value in medians.items():
            print(f"  {name:18} {value:6.2f} s  {medians['one process'] / value:5.2f} × one process")
    benchmark.extra_info |= medians
    benchmark.pedantic(run, args=(1,), rounds=1)


def _swapped(make: Any) -> tuple[Any, str, Any]:
    engine, evaluators = make()
    return engine, LAMBDAS, evaluators

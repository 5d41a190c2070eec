"""λ-parallel workers on Ray against one process: a single-threaded evaluator, time of the points
alone and of the whole."""

from __future__ import annotations

import functools
import itertools
import pathlib
import time
from typing import Any

import pytest

import pa_fast
from bench.cases import JOBS
from bench.table import Way, record
from pa_fast.launch import ray as launcher
from pa_fast.sweep import journal
from pa_fast.sweep.progress import Silent
from tests.launch import made

CASE, LAMBDAS = JOBS["workers"], "0:1:0.05"


class Clock(Silent):
    """When the first worker was ready, and when the last point was recorded."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def begin(self, points: int, finished: int) -> None:
        self.began = time.perf_counter()

    def recorded(self, entry: Any) -> None:
        self.ended = time.perf_counter()


def test_workers(benchmark: Any, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("ray")
    make = functools.partial(made.busy, CASE.size * 1_000_000)
    number = itertools.count()

    def run(workers: int) -> float:
        out, clock = tmp_path / str(next(number)), Clock()
        if workers == 1:
            pa_fast.sweep(*_swapped(make), out, progress=clock, figure=False)
        else:
            launcher.sweep(make, LAMBDAS, out, workers, progress=clock, figure=False)
        assert len(journal.read(out)) == 21
        return clock.ended - clock.began

    ways = {"one process": 1, "2 workers": 2, "one process, again": 1}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(CASE.rounds_here):
        for name, workers in ways.items():
            seconds[name].append(run(workers))
    one, two, again = found = [Way(name, tuple(values)) for name, values in seconds.items()]
    record(
        benchmark,
        CASE.target,
        "21 λ with a single-threaded evaluator, first worker's start to last point",
        found,
        against=one.name,
        noise=(one.name, again.name),
        headline=f"2 workers are {one.median_s / two.median_s:.2f} × as fast",
    )


def _swapped(make: Any) -> tuple[Any, str, Any]:
    engine, evaluators = make()
    return engine, LAMBDAS, evaluators

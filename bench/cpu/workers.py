"""λ-parallel workers on Ray against one process: a single-threaded evaluator, time of the points
alone and of the whole."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import time
from typing import Any

import pa_fast
from bench.cases import JOBS
from bench.run import Run, Skip
from pa_fast.launch import ray as launcher
from pa_fast.sweep import journal
from pa_fast.sweep.progress import Silent
from pa_fast.throughput.harness import Sample, Way, by_itself
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


def workers(run: Run) -> None:
    if importlib.util.find_spec("ray") is None:
        raise Skip("ray is not installed")
    make = functools.partial(made.busy, CASE.size * 1_000_000)
    number = itertools.count()

    def swept(count: int) -> Sample:
        out, clock = run.folder / str(next(number)), Clock()
        if count == 1:
            pa_fast.sweep(*_swapped(make), out, progress=clock, figure=False)
        else:
            launcher.sweep(make, LAMBDAS, out, count, progress=clock, figure=False)
        assert len(journal.read(out)) == 21
        return Sample(clock.ended - clock.began)

    one = Way("one process", lambda: swept(1))
    two = Way("2 workers", lambda: swept(2))
    ways = CASE.time(one, two, one.repeated, measure=by_itself, warm=0, turn=False)
    ratio = ways[one.name].median_s / ways[two.name].median_s
    run.record(
        CASE.target,
        "21 λ with a single-threaded evaluator, first worker's start to last point",
        ways.values(),
        one.name,
        headline=f"2 workers are {ratio:.2f} × as fast",
    )


def _swapped(make: Any) -> tuple[Any, str, Any]:
    engine, evaluators = make()
    return engine, LAMBDAS, evaluators

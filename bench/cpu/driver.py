"""What the driver of a sweep costs per λ by itself: 10, 1,000 and 10,000 λ with an evaluator that
does nothing.

Once over weights of one number, so that all of it is the driver's: schedule, journal (a synced line
for each point), the process's state, results. Once over a model of 0.14 M weights, so that what
grows with the number of its tensors and modules is seen. What a run costs whatever its λ are is
taken off: that of one λ.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import pa_fast
from bench.cases import JOBS
from bench.run import Run
from bench.synthetic import write_pair
from pa_fast.throughput.harness import Sample, Way, by_itself, by_wall

CASE = JOBS["driver"]


class Nothing:
    """An evaluator that scores λ."""

    name = "nothing"
    higher_is_better = True

    def __call__(self, engine: pa_fast.Engine) -> pa_fast.Score:
        return pa_fast.Score(float(engine.weights.lam or 0), "λ", 1)


class Number:
    """Weights of one number, that of λ."""

    lam: float | None = None

    def set_lambda(self, lam: float) -> None:
        self.lam = float(lam)

    def checksum(self) -> int:
        return hash(self.lam) % 2**64

    def verify(self) -> bool:
        return True

    def changed(self) -> list[str]:
        return []

    def effective_lambda(self) -> float:
        return self.lam or 0.0

    def memory(self) -> Any:
        return None


class NumberEngine:
    """An engine over a `Number` that scores nothing."""

    def __init__(self) -> None:
        self.weights = Number()
        self.tokenizer: Any = None
        self.identity = {"base": "0", "instruct": "1"}

    def loglikelihood(self, pairs: Sequence[Any]) -> list[Any]:
        raise AssertionError("no evaluator asks for it")

    def generate(self, prompts: Sequence[Any], config: Any) -> list[Any]:
        raise AssertionError("no evaluator asks for it")

    def on_weights_changed(self) -> None: ...


def driver(run: Run) -> None:
    grids: tuple[int, ...] = CASE.size
    _of(run, "weights of one number", NumberEngine(), grids)
    model = pa_fast.load(*write_pair(run.folder / "pair", "tiny"))
    tensors = len(list(model.model.named_parameters()))
    _of(run, f"a model of {tensors} tensors", model, grids)
    model.weights.close()


def _of(run: Run, what: str, engine: Any, grids: tuple[int, ...]) -> None:
    ways = [
        Way(f"{count:,} λ", lambda count=count: _per_lambda(run.folder / "out", engine, count))
        for count in grids
    ]
    _swept(run.folder / "out", engine, 2)
    found = CASE.time(*ways, ways[1].repeated, measure=by_itself, warm=0)
    middle, most = (found[f"{count:,} λ"] for count in (grids[1], grids[-1]))
    assert middle.cpu_s and most.cpu_s
    run.record(
        "",
        f"the driver's own cost per λ, over {what}",
        found.values(),
        middle.name,
        headline=(
            f"{1000 * most.cpu_s:.2f} ms of processor time per λ of {grids[-1]:,},"
            f" {most.cpu_s / middle.cpu_s:.2f} × that of {grids[1]:,}"
        ),
    )


def _per_lambda(out: pathlib.Path, engine: Any, count: int) -> Sample:
    """Of `count` λ less one, each."""
    one, all_ = _swept(out, engine, 1), _swept(out, engine, count)
    return Sample(
        (all_.wall_s - one.wall_s) / (count - 1),
        ((all_.cpu_s or 0) - (one.cpu_s or 0)) / (count - 1),
    )


def _swept(out: pathlib.Path, engine: Any, count: int) -> Sample:
    """A whole sweep of `count` λ."""

    def work() -> None:
        result = pa_fast.sweep(
            engine, [k / count for k in range(count)], [Nothing()], out, figure=False
        )
        assert len(result.rows) == count

    try:
        return by_wall(work)
    finally:
        shutil.rmtree(out)

"""Evaluators with a planted curve, and sweeps of them by an adaptive schedule: OUT [I N [PAUSE_S]]
runs one."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pa_fast.base import Engine, Evaluator, Item, Score
from pa_fast.stats.items import Items
from pa_fast.sweep import sweep
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule
from tests.stats.simulate import SHAPES, Sweeps, grid
from tests.sweep.fakes import FakeEngine

LATTICE = grid(51)


@functools.cache
def planted(shape: str, n: int, seed: int) -> Items:
    """The items of a shape at each λ of a lattice of 0.02."""
    return Sweeps(LATTICE, SHAPES[shape]).draw(np.random.default_rng(seed), n)


class Planted(Evaluator):
    """Right or wrong answers whose accuracy follows a shape of `tests.stats.simulate`."""

    higher_is_better = True

    def __init__(
        self, name: str, shape: str = "peak +5", n: int = 4000, seed: int = 0, pause_s: float = 0
    ):
        self.name = name
        self.identity: Mapping[str, Any] = {"shape": shape, "n": n, "seed": seed}
        self.calls: list[float] = []
        self._pause_s = pause_s

    @property
    def items(self) -> Items:
        return planted(**self.identity)

    def __call__(self, engine: Engine) -> Score:
        lam = engine.weights.lam
        assert lam is not None
        self.calls.append(round(lam, 6))
        time.sleep(self._pause_s)
        column = self.items.y[:, round(lam * 50)]
        items = [Item(str(k), "all", float(right)) for k, right in enumerate(column)]
        return Score(float(column.mean()), "accuracy", len(items), items)


def made(pause_s: float = 0.0) -> tuple[Engine, list[Evaluator]]:
    """An engine and the evaluators of `SCHEDULE`."""
    evaluators = [
        Planted("icl", pause_s=pause_s),
        Planted("follow", "monotone", 1000, 1, pause_s=pause_s),
    ]
    return FakeEngine(), list(evaluators)


SCHEDULE = Schedule.of("auto", "icl")


def run(out: Path, shard: tuple[int, int] | None = None, pause_s: float = 0.0) -> SweepResult:
    engine, evaluators = made(pause_s)
    return sweep(engine, SCHEDULE, evaluators, out, figure=False, shard=shard)


if __name__ == "__main__":
    place = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 2 else None
    run(Path(sys.argv[1]), place, float(sys.argv[4]) if len(sys.argv) > 4 else 0.0)

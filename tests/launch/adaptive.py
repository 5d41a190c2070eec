"""What workers of an adaptive schedule are made of."""

from __future__ import annotations

import os
from pathlib import Path

from pa_fast.base import Engine, Evaluator, Score
from tests.launch.made import append
from tests.sweep import planted
from tests.sweep.fakes import FakeEngine


class Logged(planted.Planted):
    """A planted curve whose every evaluation logs `λ name pid` before it pauses."""

    def __init__(self, log: Path, name: str, shape: str, n: int, seed: int, pause_s: float):
        super().__init__(name, shape, n, seed, pause_s)
        self._log = log

    def __call__(self, engine: Engine) -> Score:
        append(self._log, f"{engine.weights.lam} {self.name} {os.getpid()}")
        return super().__call__(engine)


def adaptive(log: Path, pause_s: float = 0.0) -> tuple[Engine, list[Evaluator]]:
    """The evaluators of `planted.SCHEDULE`."""
    return FakeEngine(), [
        Logged(log, one.name, **one.identity, pause_s=pause_s)
        for one in planted.made()[1]
        if isinstance(one, planted.Planted)
    ]

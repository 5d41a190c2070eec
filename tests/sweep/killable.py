"""A sweep in a process of its own, to be killed: OUT LOG. Says `ready` when the first point is
about to run."""

from __future__ import annotations

import sys
from pathlib import Path

from pa_fast.sweep import sweep
from tests.sweep.fakes import FakeEngine, Scorer

LAMBDAS = "0:1:1/120"


def evaluators(log: Path | None, pause_s: float) -> list[Scorer]:
    return [
        Scorer(name, unit, log=log, pause_s=pause_s)
        for name, unit in (("icl", "accuracy"), ("Perplexity/x", "nats"))
    ]


if __name__ == "__main__":
    out, log = Path(sys.argv[1]), Path(sys.argv[2])
    scorers = evaluators(log, 0.004)
    scorers[0].act = scorers[1].act = lambda engine: print("ready", flush=True)
    sweep(FakeEngine(), LAMBDAS, scorers, out, figure=False)

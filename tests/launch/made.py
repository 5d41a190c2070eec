"""What workers in other processes are made of: the fake engine, and evaluators that log where they
run. What takes time to import is elsewhere: every worker imports this.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pa_fast.base import Engine, Evaluator
from pa_fast.errors import EngineError
from tests.sweep.fakes import FakeEngine, Scorer

Make = Callable[[], tuple[Engine, list[Evaluator]]]


def append(path: Path, line: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def scorers(log: Path | None = None, pause_s: float = 0.0) -> list[Evaluator]:
    """Two evaluators; each logs `λ name pid` before it pauses for `pause_s`."""

    def act(engine: Engine, name: str) -> None:
        import time

        assert log is not None
        append(log, f"{engine.weights.lam} {name} {os.getpid()}")
        time.sleep(pause_s)

    made: list[Evaluator] = []
    for name in ("icl", "perplexity"):
        made.append(Scorer(name, act=None if log is None else functools.partial(act, name=name)))
    return made


def steady(log: Path | None = None, pause_s: float = 0.0) -> tuple[Engine, list[Evaluator]]:
    return FakeEngine(), scorers(log, pause_s)


def deadly(lam: float, log: Path) -> tuple[Engine, list[Evaluator]]:
    """Dies at `lam` in the evaluator `icl`, always."""

    def act(engine: Engine) -> None:
        append(log, f"{engine.weights.lam}")
        if engine.weights.lam == lam:
            os.kill(os.getpid(), 9)

    return FakeEngine(), [Scorer("icl", act=act), Scorer("perplexity")]


def stillborn() -> tuple[Engine, list[Evaluator]]:
    os.kill(os.getpid(), 9)
    raise AssertionError


def refusing() -> tuple[Engine, list[Evaluator]]:
    raise EngineError("no such pair", "look for it")


def different(log: Path) -> tuple[Engine, list[Evaluator]]:
    """Another engine in every process, of which none scores before there are two."""

    def act(engine: Engine) -> None:
        import time

        while log.read_text().count("made") < 2:
            time.sleep(0.05)

    append(log, "made")
    return FakeEngine({"base": str(os.getpid())}), [Scorer("icl", act=act)]


def endless(log: Path) -> tuple[Engine, list[Evaluator]]:
    """The first process is ready at once, any other one never."""
    import time

    try:
        os.close(os.open(log, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(10**6)
    return FakeEngine(), scorers()


def busy(rounds: int) -> tuple[Engine, list[Evaluator]]:
    """An evaluator that keeps one core busy."""

    def act(engine: Engine) -> None:
        total = 0
        for k in range(rounds):
            total += k * k

    return FakeEngine(), [Scorer("busy", act=act)]


def main(out: str, log: str, pause_s: str, schedule: str = "0:1:0.05") -> None:
    """A sweep with two workers, by an adaptive schedule where `schedule` is "auto"."""
    from pa_fast.launch import ray

    make: Callable[..., tuple[Engine, list[Evaluator]]] = steady
    lambdas: Any = schedule
    if schedule == "auto":
        from tests.launch.adaptive import adaptive
        from tests.sweep.planted import SCHEDULE

        make, lambdas = adaptive, SCHEDULE
    work = functools.partial(make, Path(log), float(pause_s))
    result = ray.sweep(work, lambdas, out, 2, figure=False)
    sys.exit(bool(result.failures))


if __name__ == "__main__":
    main(*sys.argv[1:])

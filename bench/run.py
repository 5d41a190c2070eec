"""One run of stages: what each is given, and what becomes of those that fail."""

from __future__ import annotations

import gc
import importlib
import math
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.report import Report
from pa_fast.throughput.harness import Table, Way, format_timing


class Skip(Exception):
    """A stage that this machine cannot run; the message says why."""


@dataclass
class Run:
    """What a stage is given.

    Attributes:
        report: the tables so far.
        until: `time.monotonic()` at which no further stage starts.
        folder: scratch of the stage, removed after it.
        ceilings: GB/s of "copy" and "stream", once they are known.
    """

    report: Report
    until: float = math.inf
    folder: pathlib.Path = field(init=False)
    stage: str = field(init=False, default="")
    ceilings: dict[str, float] = field(init=False, default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def record(
        self, target: str, case: str, ways: Iterable[Way], against: str, **words: Any
    ) -> None:
        """Print the ways of a case, and write them with the run; a stage may record several. See
        `Table` for the arguments."""
        self.report.add(
            Table(target, case, tuple(ways), against, ceilings=dict(self.ceilings), **words)
        )

    def note(self, text: str) -> None:
        """Record a sentence: what was left out and why, or what a tuning comes to."""
        self.report.note(f"{self.stage}: {text}")


@dataclass(frozen=True)
class Stage:
    """`needs_s`: seconds that must be left for it to be begun."""

    name: str
    work: Callable[[Any], None]
    needs_s: float = 0.0

    @classmethod
    def at(cls, name: str, place: str, needs_s: float = 0.0) -> Stage:
        """The stage whose work is the function at `module:function`."""
        module, _, function = place.partition(":")
        return cls(name, getattr(importlib.import_module(module), function), needs_s)


def perform(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Run the stages for which there is time. Return the names of those that failed.

    A stage that fails, by wrong bits or otherwise, leaves what it recorded and the others alone.
    """
    failed = run.report.failed
    for stage in stages:
        run.stage = stage.name
        if stage.needs_s > run.left_s:
            left_s = max(run.left_s, 0)
            run.note(f"left out: it takes about {stage.needs_s:.0f} s, and {left_s:.0f} are left")
            continue
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                run.folder = pathlib.Path(folder)
                stage.work(run)
        except Skip as reason:
            run.report.skipped.append(f"{stage.name}: {reason}")
            print(f"{stage.name}: skipped: {reason}")
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            failed.append(stage.name)
            reason = " ".join(str(error).partition("\n\nhint: ")[0].split())
            run.note(f"failed: {type(error).__name__}: {reason}")
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            took = "" if run.report.rehearsal else format_timing(time.monotonic() - began)
            print(f"{stage.name}: {took} whole stage".replace("  ", " "), flush=True)
    return failed

"""What a run of many λ costs: work that grows with the number of points, not with its square. Calls
are counted, not timed."""

from __future__ import annotations

import io
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from rich.console import Console

from pa_fast.base import Engine, Lambda, Score
from pa_fast.sweep import figure, journal, manifest, results, sweep, trade_off
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.journal import Journal
from pa_fast.sweep.manifest import EvaluatorRecord, Manifest
from pa_fast.sweep.point import Record
from pa_fast.sweep.recording import Recording
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule
from tests.sweep.fakes import FakeEngine


def calls(work: Callable[[], object]) -> int:
    """How many Python and C functions `work` calls, generator steps included."""
    count = itertools.count()

    def counted(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            next(count)

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(count)


def filled(folder: Path, points: int, names: int = 2) -> Path:
    """A run folder of `points` λ and `names` evaluators, one point in eleven failed."""
    keys = [Lambda(f"{k}/{points}").key for k in range(points)]
    columns = tuple(EvaluatorRecord(f"e{n}", n % 2 == 0, {}) for n in range(names))
    folder.mkdir()
    manifest.reconcile(folder, Manifest(tuple(keys), columns, {}, ({},), ({},)))
    lines = []
    for k, key in enumerate(keys):
        for n, column in enumerate(columns):
            score = math.sin(3 * k / points + n)
            done = JournalEntry(
                key,
                column.name,
                score,
                f"unit {n}",
                4,
                effective_lambda=k / points,
                switch_s=0.1,
                eval_s=0.1,
            )
            lines.append(
                (JournalEntry(key, column.name, error="no") if (k + n) % 11 == 0 else done).line()
            )
    (folder / journal.NAME).write_bytes(b"".join(lines))
    return folder


def printed(result: SweepResult) -> None:
    Console(file=io.StringIO(), width=1000).print(result.table())


def recorded(folder: Path) -> None:
    """A sweep that goes on: what is missing, and as many new lines as the folder has points."""
    run = manifest.load(folder)
    schedule = Schedule.of(map(Lambda, run.lambdas))
    with Recording(folder, schedule, run) as recording:
        for lam, names in recording.missing():
            for name in names:
                recording.record(
                    Record(
                        JournalEntry(
                            lam.key, name, 0.5, f"unit {name[1:]}", 4, switch_s=0.1, eval_s=0.1
                        )
                    )
                )


def drawn(result: SweepResult) -> None:
    made = figure.draw(result)
    lines = figure.lines_of(result)
    trade_off.name_points(made.axes[-1], *lines)


def of_result(use: Callable[[SweepResult], object]) -> Callable[[Path], object]:
    return lambda folder: use(results.load(folder))


WORK: dict[str, Callable[[Path], object]] = {
    "journal": lambda folder: Journal(folder).__enter__().__exit__(None, None, None),
    "load": results.load,
    "csv": of_result(SweepResult.to_csv),
    "json": of_result(SweepResult.to_json),
    "table": of_result(printed),
    "figure": of_result(drawn),
    "recording": recorded,
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.draws
def test_work_grows_with_the_number_of_points(tmp_path: Path, work: str) -> None:
    few, many = (filled(tmp_path / str(points), points) for points in (200, 800))
    WORK[work](filled(tmp_path / "first", 10))  # what is imported and cached once
    before, after = calls(lambda: WORK[work](few)), calls(lambda: WORK[work](many))
    assert after < 5 * before, f"four times the points took {after / before:.1f} times the calls"


def test_a_lambda_of_many_costs_what_one_of_few_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls, bytes written and syncs of a whole sweep, journal and process state included."""
    written = [0, 0]
    write, sync = os.write, os.fsync

    def counted_write(handle: int, data: bytes) -> int:
        written[0] += len(data)
        return write(handle, data)

    def counted_sync(handle: int) -> None:
        written[1] += 1
        sync(handle)

    monkeypatch.setattr(os, "write", counted_write)
    monkeypatch.setattr(os, "fsync", counted_sync)

    def cost(count: int) -> tuple[int, int, int]:
        def work() -> None:
            points = [f"{k}/512" for k in range(count)]
            sweep(FakeEngine(), points, [Nothing()], tmp_path / str(count), figure=False)

        written[:] = [0, 0]
        return calls(work), *written

    cost(4)  # what is imported and cached once
    few, more, many = (cost(count) for count in (32, 128, 512))
    of_few, of_many = (
        [(most - least) / points for least, most in zip(before, after)]
        for before, after, points in ((few, more, 96), (more, many, 384))
    )
    assert of_many[0] < 1.05 * of_few[0], "calls"
    assert of_many[1] < 1.1 * of_few[1], "bytes: a λ of more digits has a longer line"
    assert of_many[2] == of_few[2] == 1, "one sync a point"


class Nothing:
    """An evaluator without items."""

    name, higher_is_better = "nothing", True

    def __call__(self, engine: Engine) -> Score:
        return Score(0.5, "accuracy", 1)

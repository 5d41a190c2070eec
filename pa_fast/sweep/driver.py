"""The loop of a sweep: every missing point of the schedule, in order, recorded before the next one
starts."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence

from pa_fast.base import (
    CompleteEvaluator,
    Engine,
    Evaluator,
    Lambda,
    complete,
    complete_evaluator,
)
from pa_fast.errors import UsageError
from pa_fast.sweep import manifest, older, schedule
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.point import check_reach, visit
from pa_fast.sweep.progress import Progress, listening
from pa_fast.sweep.ready import Repeats, check_evaluators
from pa_fast.sweep.recording import Recording
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.shard import Shard


def run(
    engine: Engine,
    lambdas: str | Iterable[float | str | Lambda],
    evaluators: Sequence[Evaluator],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | object | None = None,
    figure: bool = True,
    shard: Shard | None = None,
) -> SweepResult:
    """`pa_fast.sweep`; see there."""
    told, points = listening(progress), schedule.lambdas(lambdas)
    named = {evaluator.name: evaluator for evaluator in distinct(evaluators)}
    model = complete(engine)
    check_reach(model, points)
    notes = check_evaluators(model, list(named.values()))
    now = manifest.describe(model, points, list(named.values()))
    proven = not overwrite and older.proven(model, pathlib.Path(out), now, told)
    with Recording(
        out, points, now, overwrite=overwrite, progress=told, shard=shard, proven=proven
    ) as recording:
        for note in notes:
            recording.progress.noted(note)
        repeats = Repeats(recording.scored())
        for lam, names in recording.missing():
            queue = [named[name] for name in repeats.left(names)]
            for record in visit(model, lam, queue, recording.checksum(lam), recording.progress):
                note_repeat(repeats, recording, recording.record(record))
    return finished(recording, figure)


def note_repeat(repeats: Repeats, recording: Recording, entry: Entry) -> None:
    """Tell `repeats` of a recorded attempt, and the progress of what follows from it."""
    said = repeats.note(entry)
    if said is not None:
        recording.progress.noted(said)


def finished(recording: Recording, figure: bool) -> SweepResult:
    """The result of a recording that was left without an error, drawn if `figure` says so."""
    assert recording.result is not None
    if figure:
        recording.draw()
    return recording.result


def distinct(evaluators: Sequence[Evaluator]) -> list[CompleteEvaluator]:
    """`evaluators`, complete, if each is one and no two share a name."""
    if callable(evaluators):
        raise UsageError("one evaluator instead of a list of them", "write [evaluator]")
    complete_ = [complete_evaluator(evaluator) for evaluator in evaluators]
    if not complete_:
        raise UsageError(
            "a sweep needs at least one evaluator",
            "pass a list of them; on the command line --eval, once or more",
        )
    names = []
    for evaluator in complete_:
        if not (
            isinstance(evaluator.name, str)
            and evaluator.name.strip()
            and evaluator.name.isprintable()
        ):
            raise UsageError(
                f"{evaluator.name!r} is not a name for an evaluator",
                "a text of one line is expected",
            )
        names.append(evaluator.name)
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"two evaluators are called `{twice[0]}`",
            "give each a name of its own; in an EVAL string `,name=…`",
        )
    return complete_

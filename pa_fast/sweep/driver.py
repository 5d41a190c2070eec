"""The sweep: each λ is set, proven and evaluated before the next. What would fail at every λ is
found before the first one.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence

from pa_fast.base import (
    CompleteEngine,
    CompleteEvaluator,
    Engine,
    Evaluator,
    Lambda,
    complete,
    complete_evaluator,
)
from pa_fast.errors import EvaluatorError, PaFastError, UsageError
from pa_fast.sweep import journal, manifest, schedule
from pa_fast.sweep.entry import Entry, Shard
from pa_fast.sweep.manifest import Manifest
from pa_fast.sweep.point import check_reach, check_recorded, visit
from pa_fast.sweep.progress import Progress, listening
from pa_fast.sweep.recording import Recording
from pa_fast.sweep.results import SweepResult


def proven(engine: CompleteEngine, folder: pathlib.Path, now: Manifest, progress: Progress) -> bool:
    """Whether `folder` holds such a run of this engine, whose every finished λ has its recorded
    checksum again.

    Cost: a switch and a checksum for each finished λ of such a run; else the read of one file.

    Raises:
        RunError: a finished λ has other weights now.
    """
    if not (folder / manifest.NAME).exists() or not manifest.is_sampled(manifest.load(folder), now):
        return False
    sums = {
        entry.lam: entry.checksum
        for entry in journal.read(folder)
        if entry.finished and entry.checksum is not None
    }
    for lam, recorded in sums.items():
        check_recorded(engine, Lambda(lam), recorded)
    progress.noted(
        f"{folder} was recorded without the content of the checkpoints: the weights at its"
        f" {len(sums)} finished λ were set again and have their recorded checksums, and the content"
        " is recorded from now on"
    )
    return True


# --- ready
#
# Evaluators that would fail at every λ: asked before the first one, and not tried at all of them
# where nobody could tell.


def check_evaluators(engine: CompleteEngine, evaluators: Sequence[CompleteEvaluator]) -> list[str]:
    """Ask each of `evaluators` whether it can run on `engine`; returns their
    notes.

    Raises:
        EvaluatorError: some cannot; all of them are named.
    """
    notes: list[str] = []
    doomed: list[tuple[str, str, str | None]] = []
    for evaluator in evaluators:
        try:
            notes += [f"{evaluator.name}: {note}" for note in evaluator.check(engine) or ()]
        except PaFastError as error:
            doomed.append((evaluator.name, error.message, error.hint))
        except Exception as error:  # a check of the user's own may raise anything
            doomed.append((evaluator.name, f"{type(error).__name__}: {error}", None))
    if doomed:
        lines = [f"`{name}`: {message}" for name, message, _ in doomed]
        hints = list(dict.fromkeys(hint for _, _, hint in doomed if hint))
        raise EvaluatorError(
            (
                f"evaluator {lines[0]}"
                if len(lines) == 1
                else f"{len(lines)} evaluators cannot run:\n  " + "\n  ".join(lines)
            ),
            "; or for the others: ".join(hints) if hints else None,
        )
    return notes


class Repeats:
    """Evaluators whose first two attempts of this run failed in the same words. They are not tried
    at the λ that are left: it would take the same time for the same message.

    Args:
        scored: evaluators that have a score already, which are always tried.
    """

    def __init__(self, scored: Iterable[str] = ()):
        self._first: dict[str, str | None] = dict.fromkeys(scored)
        self._stuck: set[str] = set()

    def note(self, entry: Entry) -> str | None:
        """Take in what came of an attempt. Returns a note where its evaluator will not be tried
        again."""
        if entry.checksum is None:
            return None  # the switch failed: no evaluator had a part in it
        name = entry.evaluator
        if name not in self._first:
            self._first[name] = entry.error
        elif entry.error is not None and self._first[name] == entry.error:
            self._stuck.add(name)
            return f"{name} failed twice in the same words: it is not tried at further λ"
        else:
            self._first[name] = None
        return None

    def left(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are worth trying."""
        return [name for name in names if name not in self._stuck]


def failing_alike(result: SweepResult) -> set[str]:
    """Evaluators of `result` without any score, whose failures at two λ or more are all the
    same."""
    errors: dict[str, list[str]] = {}
    for failure in result.failures:
        errors.setdefault(failure.evaluator, []).append(failure.error)
    scored = {row.evaluator for row in result.rows}
    return {
        name
        for name, found in errors.items()
        if len(found) > 1 and len(set(found)) == 1 and name not in scored
    }


# --- driver
#
# The loop of a sweep: every missing point of the schedule, in order, recorded before the next one
# starts.


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
    is_proven = not overwrite and proven(model, pathlib.Path(out), now, told)
    with Recording(
        out, points, now, overwrite=overwrite, progress=told, shard=shard, proven=is_proven
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

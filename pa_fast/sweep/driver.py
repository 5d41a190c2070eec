"""The sweep: each λ is set, verified and evaluated before the next. Errors that would occur at
every λ are raised before the first one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

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
from pa_fast.sweep import adaptive, manifest
from pa_fast.sweep.entry import JournalEntry, Shard
from pa_fast.sweep.point import MERGED_EVERY, check_reach, visit
from pa_fast.sweep.progress import Callbacks, Progress, listening
from pa_fast.sweep.recording import Recording
from pa_fast.sweep.results import Failure, SweepResult
from pa_fast.sweep.schedule import Schedule

# --- evaluators that fail at every λ


def check_evaluators(
    engine: CompleteEngine,
    evaluators: Sequence[CompleteEvaluator],
    schedule: Schedule | None = None,
) -> list[str]:
    """Call the `check` of each of `evaluators` with `engine`; return their notes.

    Args:
        schedule: with the full names of `evaluators`, of which it may need the items.

    Raises:
        EvaluatorError: some cannot; all of them are named.
        StatisticsError: one that `schedule` needs has too few items for intervals.
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
    measured = () if schedule is None else schedule.measured([one.name for one in evaluators])
    for evaluator in evaluators:
        if evaluator.name in measured:
            count = evaluator.item_count(engine)
            if count is not None:
                adaptive.check_count(evaluator.name, count)
    return notes


class Repeats:
    """Evaluators whose first two attempts of this run failed with the same message. They are not
    tried at the remaining λ.

    Args:
        scored: evaluators that have a score already, which are always tried.
    """

    def __init__(self, scored: Iterable[str] = ()):
        self._first: dict[str, str | None] = dict.fromkeys(scored)
        self._stuck: set[str] = set()

    def note(self, entry: JournalEntry) -> str | None:
        """Take note of an attempt. Returns a note for the user if its evaluator will not be tried
        again."""
        if entry.checksum is None:
            return None  # the switch failed, not the evaluator
        name = entry.evaluator
        if name not in self._first:
            self._first[name] = entry.error
        elif entry.error is not None and self._first[name] == entry.error:
            self._stuck.add(name)
            return f"{name} failed twice in the same words: it is not tried at further λ"
        else:
            self._first[name] = None
        return None

    def remaining(self, names: Sequence[str]) -> list[str]:
        """Return those of `names` that are still tried."""
        return [name for name in names if name not in self._stuck]


_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:/\d+|[eE][-+]?\d+)?)")
"""What may be a λ in a message: a decimal number, or a fraction."""


def failing_alike(result: SweepResult) -> set[str]:
    """Return the evaluators of `result` without any score whose failures, at two λ or more, have
    the same message, but for its own λ where it says that.

    One failure alone, or different words, may have passed by the next attempt.
    """
    failures: dict[str, list[Failure]] = {}
    for failure in result.failures:
        failures.setdefault(failure.evaluator, []).append(failure)
    scored = {row.evaluator for row in result.rows}
    return {
        name
        for name, own in failures.items()
        if len(own) > 1 and name not in scored and _same_words(own)
    }


def _same_words(failures: Sequence[Failure]) -> bool:
    """Return whether the messages differ at most where each says its own λ."""
    messages = [_NUMBER.split(failure.error) for failure in failures]  # text, number, text, …
    if len({len(message) for message in messages}) > 1:
        return False
    return all(
        len(set(parts)) == 1
        or (k % 2 == 1 and all(_says(part, one.lam) for part, one in zip(parts, failures)))
        for k, parts in enumerate(zip(*messages))
    )


def _says(number: str, lam: Lambda) -> bool:
    """Return whether `number` is λ, exactly or rounded to the decimals that it has."""
    if "/" in number or number == lam.key:
        return number == lam.key
    value, decimals = float(lam), len(number.partition(".")[2])
    return float(number) == value or (
        decimals > 0 and float(number) == float(f"{value:.{decimals}f}")
    )


# --- driver


def run(
    engine: Engine,
    lambdas: str | Iterable[float | str | Lambda] | Schedule,
    evaluators: Sequence[Evaluator],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | object | None = None,
    figure: bool = True,
    shard: Shard | None = None,
    callbacks: Iterable[object] = (),
) -> SweepResult:
    """Run every missing point of the schedule, in order, each recorded before the next one starts;
    see `pa_fast.sweep`."""
    schedule = Schedule.of(lambdas)
    called = Callbacks(listening(progress), callbacks, engine)
    events = cast(Progress, called)
    named = {evaluator.name: evaluator for evaluator in distinct(evaluators)}
    schedule = schedule.resolved(list(named))
    model = complete(engine)
    check_reach(model, schedule.points)
    notes = check_evaluators(model, list(named.values()), schedule)
    now = manifest.describe(model, schedule, list(named.values()))
    with Recording(
        out, schedule, now, overwrite=overwrite, progress=events, shard=shard
    ) as recording:
        for note in notes:
            recording.progress.noted(note)
        repeats = Repeats(recording.scored())
        for visited, (lam, names) in enumerate(all_missing(recording)):
            queue = [named[name] for name in repeats.remaining(names)]
            for record in visit(
                model,
                lam,
                queue,
                recording.checksum(lam),
                recording.progress,
                merge_again=visited % MERGED_EVERY == 0,
            ):
                note_repeat(repeats, recording, recording.record(record))
    result = finished(recording, figure)
    called.finished(result)
    return result


def all_missing(recording: Recording) -> Iterator[tuple[Lambda, list[str]]]:
    """Yield each λ with its evaluators that are not finished, then those of the λ that the schedule
    adds."""
    yield from recording.missing()
    while recording.extend():
        yield from recording.missing()


def note_repeat(repeats: Repeats, recording: Recording, entry: JournalEntry) -> None:
    """Add a recorded attempt to `repeats`, and show the note that it may return."""
    note = repeats.note(entry)
    if note is not None:
        recording.progress.noted(note)


def finished(recording: Recording, figure: bool) -> SweepResult:
    """Return the result of a recording that ended without an error; draw it if `figure` is true."""
    assert recording.result is not None
    if figure:
        recording.draw()
    return recording.result


def distinct(evaluators: Sequence[Evaluator]) -> list[CompleteEvaluator]:
    """Return `evaluators` with all members of `CompleteEvaluator`.

    Raises:
        UsageError: there is none, one is no evaluator, or two share a name.
    """
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

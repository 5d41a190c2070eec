"""Evaluators that would fail at every λ: asked before the first one, and not tried at all of them
where nobody could tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pa_fast.base import CompleteEngine, CompleteEvaluator
from pa_fast.errors import EvaluatorError, PaFastError
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.results import SweepResult


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

"""Adaptive schedules in a sweep: from its results to the λ that are evaluated next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pa_fast.base import Lambda
from pa_fast.errors import StatisticsError
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule, exact

if TYPE_CHECKING:
    from pa_fast.stats import Finding
    from pa_fast.stats.items import Column, Items

# `pa_fast.stats` is imported inside functions: it imports SciPy, which a fixed schedule does not
# need


def following(
    schedule: Schedule, result: SweepResult, points: Sequence[Lambda]
) -> tuple[list[Lambda], str]:
    """Return the λ to add to `points`, none where the schedule is complete, and the reason.

    It is a function of the finished points alone, in whatever order they came.

    Raises:
        StatisticsError: the items of an evaluator do not make up its score.
        RunError: a file of items is missing or damaged.
    """
    from pa_fast.stats import adaptive, frontier
    from pa_fast.stats.curve import curve
    from pa_fast.stats.finding import find
    from pa_fast.stats.items import collect

    evaluations = {one.name: one for one in result.evaluations()}
    names = schedule.needed(result.evaluators)
    for name in names:
        scored = evaluations[name].values if name in evaluations else {}
        for lam in points:
            if lam not in scored:
                return [], f"`{name}` has no score at λ = {lam.key}"

    def items_of(name: str) -> Items:
        one = evaluations[name]
        with _named(name):
            return collect({lam: one.column(lam) for lam in points}, one.higher_is_better)

    items = items_of(names[0])
    allowed = items.lams >= items.lams.min()
    for name, share in schedule.keep.items():
        other = items_of(name)
        allowed &= frontier.kept(curve(other), len(other.lams) - 1, share)
    others = {float(lam): lam for lam in evaluations[names[0]].values if lam not in points}
    more = adaptive.following(items, list(others), allowed)
    lams = [others.get(lam) or exact(lam) for lam in more.lams]
    why = _why(schedule, find(evaluations[names[0]]), more.why)
    remaining = schedule.budget - len(points)
    if len(lams) > remaining:
        # the inner ones: the outer neighbours only bound the range
        middle = sum(more.lams) / len(lams)
        kept = sorted(lams, key=lambda lam: (abs(float(lam) - middle), lam.exact))[:remaining]
        rest = ", ".join(lam.key for lam in lams if lam not in kept)
        why = (
            f"{why}; {rest} beyond the budget of {schedule.budget} λ"
            if kept
            else f"the budget of {schedule.budget} λ is spent; next would be {rest}: {why}"
        )
        lams = sorted(kept, key=lambda lam: lam.exact)
    return lams, why


def _why(schedule: Schedule, finding: Finding, step: str) -> str:
    """Return the reason of a step, behind the range of the best λ as the answer would give it
    now."""
    limits = " and ".join(f"{100 * share:g} % of {name}" for name, share in schedule.keep.items())
    step = f"of the λ that keep {limits}, {step}" if limits else step
    if finding.refused is not None:  # other λ of the folder have other items
        return step
    low, high = finding.range
    return f"the best λ lies in {low.key}–{high.key}; {step}"


def check_count(name: str, count: int) -> None:
    """Check that the `count` items of evaluator `name` are enough.

    Raises:
        StatisticsError: they are fewer than two.
    """
    from pa_fast.stats import items

    with _named(name):
        items.check_count(count)


def check_column(name: str, lam: Lambda, column: Column, higher_is_better: bool) -> None:
    """Check that the items of evaluator `name` at one λ make up its score there.

    Raises:
        StatisticsError: they do not, or are fewer than two.
    """
    from pa_fast.stats import items

    with _named(name):
        items.collect({lam: column}, higher_is_better)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the evaluator, and who needs its items, in a StatisticsError of the block."""
    try:
        yield
    except StatisticsError as error:
        raise StatisticsError(
            f"`auto` and shares to keep need items that make up the score of `{name}`:"
            f" {error.message}",
            error.hint,
        ) from None

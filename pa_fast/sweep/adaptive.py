"""Adaptive schedules in a sweep: from its results to the λ that are evaluated next."""

from __future__ import annotations

from collections.abc import Sequence

from pa_fast.base import Lambda
from pa_fast.errors import StatisticsError
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule, exact


def following(
    schedule: Schedule, result: SweepResult, points: Sequence[Lambda]
) -> tuple[list[Lambda], str]:
    """Return the λ to add to `points`, none where the schedule is complete, and the reason.

    It is a function of the finished points alone, in whatever order they came.

    Raises:
        StatisticsError: the items of an evaluator do not make up its score.
        RunError: a file of items is missing or damaged.
    """
    # here: they import SciPy, which a fixed schedule does not need
    from pa_fast.stats import adaptive, frontier
    from pa_fast.stats.curve import curve
    from pa_fast.stats.items import Items, collect

    evaluations = {one.name: one for one in result.evaluations()}
    names = schedule.needed(result.evaluators)
    for name in names:
        scored = evaluations[name].values if name in evaluations else {}
        for lam in points:
            if lam not in scored:
                return [], f"`{name}` has no score at λ = {lam.key}"

    def items_of(name: str) -> Items:
        one = evaluations[name]
        try:
            return collect({lam: one.column(lam) for lam in points}, one.higher_is_better)
        except StatisticsError as error:
            raise StatisticsError(
                f"`auto` needs items that make up the score of `{name}`: {error.message}",
                error.hint,
            ) from None

    items = items_of(names[0])
    allowed = items.lams >= items.lams.min()
    for name, share in schedule.keep.items():
        other = items_of(name)
        allowed &= frontier.kept(curve(other), len(other.lams) - 1, share)
    others = {float(lam): lam for lam in evaluations[names[0]].values if lam not in points}
    more = adaptive.following(items, list(others), allowed)
    remaining = schedule.budget - len(points)
    lams, why = [others.get(lam) or exact(lam) for lam in more.lams], more.why
    if len(lams) > remaining:
        # the inner ones: the outer neighbours only bound the range
        middle = sum(more.lams) / len(lams)
        lams = sorted(lams, key=lambda lam: (abs(float(lam) - middle), lam.exact))[:remaining]
        lams.sort(key=lambda lam: lam.exact)
        why += f"; the budget is {schedule.budget} λ"
    return lams, why

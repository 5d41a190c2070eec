"""Findings: the curve of one evaluator with its differences, its set of λ* and its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pa_fast.base import BASE, INSTRUCT, Lambda, Score
from pa_fast.errors import StatisticsError, UsageError
from pa_fast.stats.bands import LEVEL, Band, band, best_set, draws, hull
from pa_fast.stats.curve import Curve, curve, percent
from pa_fast.stats.items import Array, Column, Items, collect

MOST_LAMBDAS = 101
"""Most λ that are analysed, evenly spread: the cost grows with their number squared."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluator's scores along λ, with their items.

    Attributes:
        values: the reported scores, in `unit`.
        column: λ → its items; called only for the λ that are analysed.
    """

    name: str
    higher_is_better: bool
    values: Mapping[Lambda, float]
    column: Callable[[Lambda], Column]
    unit: str = ""

    @classmethod
    def of(
        cls, name: str, scores: Mapping[Any, Score], higher_is_better: bool = True
    ) -> Evaluation:
        """Return the evaluation of scores by λ (a `Lambda`, a number or text), as the evaluator
        returned them."""
        exact = {Lambda(lam): score for lam, score in scores.items()}
        values = {lam: score.value for lam, score in exact.items()}
        unit = next((score.unit for score in exact.values()), "")
        return cls(name, higher_is_better, values, lambda lam: Column.of(exact[lam]), unit)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval, which holds at all λ at once, and the adjusted p of "none"."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, eq=False)
class Finding:
    """The curve of one evaluator, or of one task of it, with its statistics.

    Attributes:
        lams: the K λ that were analysed, ascending.
        scores: (K,) as reported.
        left_out: number of other λ that have a score.
        refused: the reason why there are no intervals; the fields after it are then empty.
        items, curve: higher is better, costs with their sign changed.
        in_set: (K,) True where a λ may be the best one.
        bands: of differences to λ = 1 and λ = 0, where these were evaluated; higher is better.
    """

    name: str
    higher_is_better: bool
    lams: tuple[Lambda, ...]
    scores: Array
    unit: str = ""
    level: float = LEVEL
    left_out: int = 0
    refused: StatisticsError | None = None
    items: Items | None = None
    curve: Curve | None = None
    in_set: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    bands: Mapping[Lambda, Band] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Items at each λ."""
        return 0 if self.items is None else len(self.items.y)

    @property
    def range(self) -> tuple[Lambda, Lambda]:
        """The range of the best λ: the set's hull, widened to the λ next to it."""
        self.measured()
        low, high = hull(self.in_set)
        return self.lams[low], self.lams[high]

    @property
    def scale(self) -> int:
        """100 where item scores are from 0 to 1, so that differences are in points; else 1."""
        y = self.measured()[0].y
        return 100 if np.abs(y).max() <= 1 and y.min() >= 0 else 1

    def index(self, lam: Lambda) -> int:
        """Return the index of `lam` in `lams`.

        Raises:
            UsageError: it was not evaluated.
        """
        if lam not in self.lams:
            raise UsageError(f"`{self.name}` has no score at λ = {lam.key}", "evaluate it there")
        return self.lams.index(lam)

    def difference(self, lam: Lambda, ref: Lambda = INSTRUCT) -> Interval:
        """Return the score at `lam` less that at `ref`, λ = 1 or 0, as reported: of costs < 0 is
        better.

        Raises:
            StatisticsError: no interval can be given.
            UsageError: either was not evaluated.
        """
        self.measured()
        self.index(ref)
        held, index = self.bands[ref], self.index(lam)
        bounds = held.low[index], held.high[index]
        if self.higher_is_better:
            return Interval(*map(float, (held.diff[index], *bounds, held.p[index])))
        return Interval(*map(float, (-held.diff[index], -bounds[1], -bounds[0], held.p[index])))

    def percent(self, lam: Lambda, ref: Lambda = INSTRUCT) -> Interval:
        """Return the score at `lam` as a share of that at `ref`: 1 is all of it.

        Raises:
            StatisticsError: no interval can be given.
            UsageError: either was not evaluated, or the score at `ref` is about 0.
        """
        whole = percent(self.measured()[1], self.index(ref))
        held, index = band(whole, self.index(ref), draws(whole.cov), self.level), self.index(lam)
        figures = 1 + held.diff[index], 1 + held.low[index], 1 + held.high[index], held.p[index]
        return Interval(*map(float, figures))

    def wins(self, lam: Lambda, ref: Lambda = INSTRUCT) -> tuple[int, int]:
        """Return the numbers of items that are better at `lam` than at `ref`, and that are
        worse."""
        y = self.measured()[0].y
        change = y[:, self.index(lam)] - y[:, self.index(ref)]
        return int((change > 0).sum()), int((change < 0).sum())

    def tasks(self) -> tuple[Finding, ...]:
        """Return a finding for each task, a group of items, by name; its bands hold for this task
        alone, not for all together. A task of one item is refused.

        Cost: that of a finding for each.
        """
        items, _ = self.measured()
        names = np.unique(items.groups)
        if len(names) == 1:
            return (replace(self, name=str(names[0])),)
        return tuple(self._task(str(name), items.task(str(name))) for name in names)

    def _task(self, name: str, items: Items) -> Finding:
        values = items.values() if self.higher_is_better else -items.values()
        blank = Finding(
            name, self.higher_is_better, self.lams, values, self.unit, self.level, self.left_out
        )
        if len(items.y) < 2:
            return replace(blank, refused=StatisticsError(f"task `{name}` has 1 item"))
        return _measured(blank, items)

    def measured(self) -> tuple[Items, Curve]:
        """Return the items and their curve.

        Raises:
            StatisticsError: there are none, so no interval can be given.
        """
        if self.items is None or self.curve is None:
            raise self.refused or StatisticsError(f"`{self.name}` has no items")
        return self.items, self.curve


def find(evaluation: Evaluation, level: float = LEVEL) -> Finding:
    """Return the finding of one evaluator, without intervals where its items do not make up its
    scores.

    Of more than 101 λ that many are analysed, the best and λ = 0 and 1 among them.

    Raises:
        UsageError: there is no score at all.
    """
    lams = tuple(sorted(evaluation.values, key=lambda lam: lam.exact))
    if not lams:
        raise UsageError(f"`{evaluation.name}` has no score", "run the sweep first")
    scores = np.array([evaluation.values[lam] for lam in lams])
    sign = 1 if evaluation.higher_is_better else -1
    indices = _thinned(lams, int(np.argmax(sign * scores)))
    lams, left_out = tuple(lams[index] for index in indices), len(lams) - len(indices)
    blank = Finding(
        evaluation.name,
        evaluation.higher_is_better,
        lams,
        scores[indices],
        evaluation.unit,
        level,
        left_out,
    )
    try:
        columns = {lam: evaluation.column(lam) for lam in lams}
        items = collect(columns, evaluation.higher_is_better)
    except StatisticsError as error:
        return replace(blank, refused=error)
    return _measured(blank, items)


def _measured(blank: Finding, items: Items) -> Finding:
    points = curve(items)
    z = draws(points.cov)
    bands = {
        ref: band(points, blank.lams.index(ref), z, blank.level)
        for ref in (INSTRUCT, BASE)
        if ref in blank.lams
    }
    return replace(
        blank, items=items, curve=points, in_set=best_set(points, z, blank.level), bands=bands
    )


def _thinned(lams: tuple[Lambda, ...], best: int) -> list[int]:
    """Return the indices of the λ that are analysed."""
    if len(lams) <= MOST_LAMBDAS:
        return list(range(len(lams)))
    named = {best} | {lams.index(ref) for ref in (INSTRUCT, BASE) if ref in lams}
    spread = np.linspace(0, len(lams) - 1, MOST_LAMBDAS - len(named)).round().astype(int)
    return sorted(named | set(spread.tolist()))

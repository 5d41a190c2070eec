"""Items that make up a score: the rows that every statistic of a sweep is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pa_fast.base import Item, Lambda, Score
from pa_fast.errors import StatisticsError

Array = NDArray[np.float64]
TOLERANCE = 1e-9
"""How far the items' own value may lie from the reported one, relative to it where that is > 1."""


@dataclass(frozen=True)
class Items:
    """n items in G strata, scored at K λ; the same items at each, higher is better.

    Attributes:
        lams: (K,) ascending.
        y: (n, K) scores of the items, those of costs with their sign changed.
        weights: (n,) what each counts in the whole; their sum is 1.
        starts: (G,) first row of each stratum; rows of one stratum are neighbours.
        step: the smallest change of one item's score from one λ to another: 1 for right or wrong.
        parts: (n, K, P) of a metric that is no mean of items, such as true positives, false
            positives and false negatives; None where it is a mean.
        formula: makes the metric of the sums of parts.
    """

    lams: Array
    y: Array
    weights: Array
    starts: NDArray[np.int64]
    step: float = 1.0
    parts: Array | None = None
    formula: Formula | None = None

    @property
    def counts(self) -> NDArray[np.int64]:
        """(G,) items of each stratum."""
        return np.diff(self.starts, append=len(self.y))

    @property
    def floor(self) -> float:
        """The change of the value when one item changes, the heaviest one."""
        return float(self.weights.max()) * self.step

    def values(self) -> Array:
        """(K,) the value at each λ."""
        if self.parts is None or self.formula is None:
            return self.weights @ self.y
        shares = np.add.reduceat(self.weights, self.starts)
        strata = self.formula.inner(np.add.reduceat(self.parts, self.starts, axis=0))
        return self.formula.finish(shares @ strata)

    def take(self, rows: NDArray[np.bool_]) -> Items:
        """The items where `rows` is true; each stratum that keeps any counts what it did."""
        stratum = np.repeat(np.arange(len(self.starts)), self.counts)
        before = np.add.reduceat(self.weights, self.starts)
        kept = np.bincount(stratum[rows], self.weights[rows], minlength=len(before))
        weights = self.weights[rows] * (before / np.where(kept > 0, kept, 1.0))[stratum[rows]]
        counts = np.bincount(stratum[rows], minlength=len(before))
        counts = counts[counts > 0]
        return replace(
            self,
            y=self.y[rows],
            weights=weights / weights.sum(),
            starts=np.cumsum(counts) - counts,
            parts=None if self.parts is None else self.parts[rows],
        )

    def at(self, columns: Sequence[int] | NDArray[Any]) -> Items:
        """The same items at some of the λ."""
        parts = None if self.parts is None else self.parts[:, columns]
        return replace(self, lams=self.lams[columns], y=self.y[:, columns], parts=parts)


@dataclass(frozen=True)
class Formula:
    """How sums of parts make a metric: one of each stratum, averaged by share, then `outer`.

    Attributes:
        parts: their names, as an item's `parts` has them.
        inner: (…, P) sums to the metric of a stratum.
        outer: of the average, and what is reported.
        sign: −1 for costs.
    """

    parts: tuple[str, ...]
    inner: Callable[[Array], Array]
    outer: Callable[[Array], Array] = field(default=lambda average: average)
    sign: int = 1

    def finish(self, average: Array) -> Array:
        """The value, higher is better, of the average of `inner` over strata."""
        return self.sign * self.outer(average)


def _ratio(above: Array, below: Array) -> Array:
    """`above / below`, 0 where nothing is below, as scikit-learn has it for F1 and Matthews'."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _f1(sums: Array) -> Array:
    positive, false_positive, false_negative = np.moveaxis(sums, -1, 0)
    return _ratio(2 * positive, 2 * positive + false_positive + false_negative)


def _matthews(sums: Array) -> Array:
    tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return _ratio(tp * tn - fp * fn, below)


FORMULAS = (
    Formula(("numerator", "denominator"), lambda sums: _ratio(sums[..., 0], sums[..., 1])),
    Formula(("tp", "fp", "fn"), _f1),
    Formula(("tp", "fp", "fn", "tn"), _matthews),
    Formula(("nats", "tokens"), lambda sums: _ratio(sums[..., 0], sums[..., 1]), np.exp),
)
"""Metrics that are no means of items, by the names of their parts: a ratio of sums, F1, Matthews'
correlation, and perplexity, whose average over strata is one of nats per token."""


def collect(scores: Mapping[Lambda, Score], higher_is_better: bool) -> Items:
    """The items of an evaluator at each λ, by group and id, checked against the reported values.

    A value is Σ weight · score / Σ weight. Items without weights (all 1) may make it up as the mean
    over groups of each one's mean, too. Items with `parts` make it up by the formula of those.
    Groups are strata; those of a single item are merged, or join the smallest where there is one.

    Args:
        scores: of one evaluator, by λ.

    Raises:
        StatisticsError: there are no items, or a single one; they differ along λ; or their own
            value is not the reported one to 1e-9.
    """
    lams = sorted(scores, key=lambda lam: lam.exact)
    first = scores[lams[0]].items
    if len(first) < 2:
        raise StatisticsError(
            f"the score has {len(first) or 'no'} item{'s' * (len(first) != 1)}", _HINT
        )
    columns = [_aligned(scores[lam].items, first, lam) for lam in lams]
    sign = 1 if higher_is_better else -1
    y = np.array([[item.score for item in column] for column in columns]).T
    weights = _same_weights(columns, lams)
    groups = np.unique([item.group for item in first], return_inverse=True)[1]
    strata = _merged(groups)
    order = np.lexsort(([item.id for item in first], groups, strata))
    counts = np.bincount(strata)
    starts = np.cumsum(counts) - counts
    parts, formula = _parts(columns, sign)
    reported = np.array([scores[lam].value for lam in lams]) * sign
    stepped = y if parts is None else parts[..., 0]
    whole = Items(
        np.array(lams, float),
        sign * y[order],
        weights[order] / weights.sum(),
        starts,
        _step(stepped),
        None if parts is None else parts[order],
        formula,
    )
    macro = (1 / np.bincount(groups))[groups][order]
    return _checked(whole, macro / macro.sum(), reported, lams)


def _aligned(items: Sequence[Item], first: Sequence[Item], lam: Lambda) -> Sequence[Item]:
    """`items` in the order of `first`."""
    same = len(items) == len(first)
    if same and all(a.id == b.id and a.group == b.group for a, b in zip(items, first)):
        return items
    by_name = {(item.group, item.id): item for item in items}
    if len(by_name) != len(first) or not all((item.group, item.id) in by_name for item in first):
        raise StatisticsError(
            f"the items at λ = {lam.key} are not those of the other λ",
            "score the same items, with the same ids and groups, at each λ",
        )
    return [by_name[item.group, item.id] for item in first]


def _same_weights(columns: Sequence[Sequence[Item]], lams: Sequence[Lambda]) -> Array:
    weights = np.array([[item.weight for item in column] for column in columns])
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.all(weights.sum(1) > 0):
        raise StatisticsError("weights of items are not all finite and ≥ 0, with a sum > 0", _HINT)
    for lam, other in zip(lams, weights):
        if not np.allclose(other, weights[0], rtol=1e-12, atol=0):
            raise StatisticsError(
                f"the weights of items at λ = {lam.key} are not those of the other λ", _HINT
            )
    return weights[0]


def _parts(columns: Sequence[Sequence[Item]], sign: int) -> tuple[Array | None, Formula | None]:
    """(n, K, P) parts and their formula; None where the items have none."""
    names = {frozenset(item.parts or ()) for column in columns for item in column}
    if names == {frozenset()}:
        return None, None
    formula = next((one for one in FORMULAS if names == {frozenset(one.parts)}), None)
    if formula is None:
        found = " and ".join(sorted(", ".join(sorted(one)) or "none" for one in names))
        known = "; ".join(", ".join(one.parts) for one in FORMULAS)
        raise StatisticsError(
            f"items have the parts {found}", f"one of these for all items: {known}"
        )
    values = [[[(i.parts or {})[p] for p in formula.parts] for i in column] for column in columns]
    parts = np.moveaxis(np.array(values, float), 0, 1)
    if not np.all(np.isfinite(parts)):
        raise StatisticsError("parts of items are not all finite", _HINT)
    return parts, replace(formula, sign=sign)


def _merged(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups as strata of two items or more, numbered from 0."""
    counts = np.bincount(groups)
    single = np.flatnonzero(counts == 1)
    if len(single) and len(counts) > 1:
        others = np.flatnonzero(counts > 1)
        alone = len(single) == 1
        into = others[np.argmin(counts[others])] if alone else single[0]
        groups = np.where(np.isin(groups, single), into, groups)
    return np.unique(groups, return_inverse=True)[1]


def _step(y: Array) -> float:
    """The smallest change along λ; 1 where no item changes. Rounding is none."""
    gaps = np.diff(np.sort(y, axis=1), axis=1)
    gaps = gaps[gaps > TOLERANCE * np.ptp(y)]
    return float(gaps.min()) if gaps.size else 1.0


def _checked(items: Items, macro: Array, reported: Array, lams: Sequence[Lambda]) -> Items:
    """`items`, or with `macro` for equal weights, whichever makes up the reported values."""
    candidates = [items]
    if np.ptp(items.weights) == 0 and np.ptp(macro) > 0:
        candidates.insert(0, replace(items, weights=macro))
    for candidate in candidates:
        off = np.abs(candidate.values() - reported)
        if np.all(off <= TOLERANCE * np.maximum(1.0, np.abs(reported))):
            return candidate
    worst = int(np.argmax(off))
    raise StatisticsError(
        f"the items do not make up the score: at λ = {lams[worst].key} they give "
        f"{abs(candidate.values()[worst]):.6g}, and {abs(reported[worst]):.6g} is reported",
        _HINT,
    )


_HINT = (
    "an evaluator's items need Σ weight · score / Σ weight = value, or parts that make it up; "
    "see pa_fast.Item"
)

"""Items that make up a score: the rows from which every statistic of a sweep is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pa_fast.base import Lambda, Score
from pa_fast.errors import StatisticsError

Array = NDArray[np.float64]
TOLERANCE = 1e-9
"""Allowed distance of the items' own value from the reported one, relative where that is > 1."""


@dataclass(frozen=True)
class Column:
    """The n items of one evaluator at one λ, and the value that it reported.

    Attributes:
        ids, groups: of the items, in any order.
        scores, weights: (n,) numbers.
        parts: of each item, None where it has none; empty where no item has any.
    """

    value: float
    ids: Sequence[str]
    groups: Sequence[str]
    scores: Sequence[float]
    weights: Sequence[float]
    parts: Sequence[Mapping[str, float] | None] = ()

    @classmethod
    def of(cls, score: Score) -> Column:
        """Return the items of `score`."""
        items = score.items
        parts = [item.parts for item in items]
        return cls(
            score.value,
            [item.id for item in items],
            [item.group for item in items],
            [item.score for item in items],
            [item.weight for item in items],
            parts if any(parts) else (),
        )

    def ordered_as(self, other: Column, lam: Lambda) -> Column:
        """Return the same items in the order of `other`.

        Raises:
            StatisticsError: `other` has other items.
        """
        if self.ids == other.ids and self.groups == other.groups:
            return self
        row_of = {name: row for row, name in enumerate(zip(self.groups, self.ids))}
        names = list(zip(other.groups, other.ids))
        if len(self.ids) != len(names) or row_of.keys() != set(names):
            raise StatisticsError(
                f"the items at λ = {lam.key} are not those of the other λ",
                "score the same items, with the same ids and groups, at each λ",
            )
        rows = [row_of[name] for name in names]
        return replace(
            self,
            ids=other.ids,
            groups=other.groups,
            scores=[self.scores[row] for row in rows],
            weights=[self.weights[row] for row in rows],
            parts=[self.parts[row] for row in rows] if self.parts else (),
        )


@dataclass(frozen=True)
class Formula:
    """Metric of sums of parts: `inner` of each stratum, averaged, then `outer`.

    Attributes:
        parts: their names, as an item's `parts` has them.
        inner: (…, P) sums over a stratum to its metric.
        outer: average over strata → reported value; None: the average itself.
    """

    parts: tuple[str, ...]
    inner: Callable[[Array], Array]
    outer: Callable[[Array], Array] | None = None


def _ratio(above: Array, below: Array) -> Array:
    """Return `above / below`, 0 where `below` is 0, as scikit-learn does for F1 and Matthews'."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _f1(sums: Array) -> Array:
    tp, fp, fn = np.moveaxis(sums, -1, 0)
    return _ratio(2 * tp, 2 * tp + fp + fn)


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


@dataclass(frozen=True)
class Items:
    """n items in G strata, scored at K λ; the same items at each, higher is better.

    Attributes:
        lams: (K,) ascending.
        y: (n, K) scores of the items, those of costs with their sign changed.
        weights: (n,) of each in the value; their sum is 1.
        starts: (G,) first row of each stratum; rows of one stratum are neighbours.
        groups: (n,) the task of each item; a task of several items is a stratum.
        step: the smallest change of one item's score from one λ to another: 1 for right or wrong.
        parts: (n, K, P) of a metric that is no mean of items; None where it is a mean.
        formulas: of each stratum, from its sums of parts to the metric.
        sign: −1 where the metric of `parts` is a cost.
    """

    lams: Array
    y: Array
    weights: Array
    starts: NDArray[np.int64]
    groups: NDArray[np.str_]
    step: float = 1.0
    parts: Array | None = None
    formulas: tuple[Formula, ...] = ()
    sign: int = 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of items of each stratum, (G,)."""
        return np.diff(self.starts, append=len(self.y))

    @property
    def floor(self) -> float:
        """The change of the value when the item of the largest weight changes."""
        return float(self.weights.max()) * self.step

    def values(self) -> Array:
        """Return (K,) the value at each λ."""
        if self.parts is None:
            return self.weights @ self.y
        return self.combined(np.add.reduceat(self.parts, self.starts, axis=0))

    def combined(self, sums: Iterable[Array]) -> Array:
        """Return (…, K) the values of sums of parts, an array (…, K, P) of each stratum."""
        shares = np.add.reduceat(self.weights, self.starts)
        average = sum(
            share * formula.inner(one[..., : len(formula.parts)])
            for share, formula, one in zip(shares, self.formulas, sums, strict=True)
        )
        outer = self.formulas[0].outer
        values: Array = self.sign * np.asarray(average if outer is None else outer(average))
        return values

    def take(self, rows: NDArray[np.bool_]) -> Items:
        """Return the items where `rows` is true; each stratum that keeps any keeps its weight."""
        stratum = np.repeat(np.arange(len(self.starts)), self.counts)[rows]
        counts = np.bincount(stratum, minlength=len(self.starts))
        kept = np.bincount(stratum, self.weights[rows], minlength=len(self.starts))
        scale = np.add.reduceat(self.weights, self.starts) / np.where(kept > 0, kept, 1.0)
        weights = self.weights[rows] * scale[stratum]
        remaining = counts[counts > 0]
        return replace(
            self,
            y=self.y[rows],
            weights=weights / weights.sum(),
            starts=np.cumsum(remaining) - remaining,
            groups=self.groups[rows],
            parts=None if self.parts is None else self.parts[rows],
            formulas=tuple(f for f, count in zip(self.formulas, counts) if count),
        )

    def task(self, name: str) -> Items:
        """Return the items of one task, with weights that sum to 1."""
        return self.take(self.groups == name)

    def select(self, columns: Sequence[int] | NDArray[Any]) -> Items:
        """Return the same items at the λ of these indices."""
        parts = None if self.parts is None else self.parts[:, columns]
        return replace(self, lams=self.lams[columns], y=self.y[:, columns], parts=parts)


def collect(columns: Mapping[Lambda, Column], higher_is_better: bool) -> Items:
    """Return the items of an evaluator at each λ, by group and id, checked against the reported
    values.

    A value is Σ weight · score / Σ weight. For items without weights (all 1) it may also be the
    mean over groups of each one's mean, and for items with `parts` it is their formula. Groups are
    strata; those of a single item are merged, a lone one with the smallest other.

    Args:
        columns: of one evaluator, by λ.

    Raises:
        StatisticsError: there are no items, or a single one; they differ along λ; or their own
            value is not the reported one to 1e-9.
    """
    lams = sorted(columns, key=lambda lam: lam.exact)
    first = columns[lams[0]]
    check_count(len(first.ids))
    ordered = [columns[lam].ordered_as(first, lam) for lam in lams]
    sign = 1 if higher_is_better else -1
    groups = np.unique(np.array(first.groups), return_inverse=True)[1]
    strata = _merged(groups)
    order = np.lexsort((np.array(first.ids), groups, strata))
    counts = np.bincount(strata)
    y = np.array([column.scores for column in ordered], float).T[order]
    weights = _same_weights(ordered, lams)[order]
    whole = Items(
        np.array(lams, float),
        sign * y,
        weights / weights.sum(),
        np.cumsum(counts) - counts,
        np.array(first.groups)[order],
    )
    if any(column.parts for column in ordered):
        whole = _with_parts(whole, ordered, order, sign)
    whole = replace(whole, step=_step(y if whole.parts is None else whole.parts[..., 0]))
    macro = (1 / np.bincount(groups))[groups][order]
    reported = sign * np.array([column.value for column in ordered])
    return _checked(whole, macro / macro.sum(), reported, lams)


def check_count(n: int) -> None:
    """Raise StatisticsError unless `n`, the number of items of a score, is enough for intervals:
    two."""
    if n == 0:
        raise StatisticsError(
            "the score has no items", "return a pa_fast.Score with an Item for each example"
        )
    if n == 1:
        raise StatisticsError(
            "the score has 1 item, of at least 2",
            "score more items; a text file is one item of perplexity, or with split=blank one for"
            " each paragraph",
        )


def _same_weights(columns: Sequence[Column], lams: Sequence[Lambda]) -> Array:
    weights = np.array([column.weights for column in columns], float)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or not np.all(weights.sum(1) > 0):
        raise StatisticsError("weights of items are not all finite and ≥ 0, with a sum > 0", _HINT)
    for lam, other in zip(lams, weights):
        if not np.allclose(other, weights[0], rtol=1e-12, atol=0):
            raise StatisticsError(
                f"the weights of items at λ = {lam.key} are not those of the other λ", _HINT
            )
    return weights[0]


def _with_parts(
    items: Items, columns: Sequence[Column], order: NDArray[np.int64], sign: int
) -> Items:
    """Return `items` with the parts of `columns`, and the formula of each stratum."""
    known = {frozenset(formula.parts): formula for formula in FORMULAS}
    rows = [column.parts or [None] * len(order) for column in columns]
    names = {frozenset(part or ()) for row in rows for part in row}
    if not names <= known.keys():
        unknown = " and ".join(sorted(", ".join(sorted(one)) or "none" for one in names))
        listed = "; ".join(", ".join(formula.parts) for formula in FORMULAS)
        raise StatisticsError(f"items have the parts {unknown}", f"one of these for all: {listed}")
    parts = np.zeros((*items.y.shape, max(map(len, names))))
    formulas = []
    for start, count in zip(items.starts, items.counts):
        rows_here = [[row[i] or {} for i in order[start : start + count]] for row in rows]
        kinds = {frozenset(part) for row in rows_here for part in row}
        if len(kinds) > 1:
            raise StatisticsError("items of one group have different parts", _HINT)
        formulas.append(formula := known[kinds.pop()])
        values = [[[part[name] for name in formula.parts] for part in row] for row in rows_here]
        filled = np.moveaxis(np.array(values, float), 0, 1)
        parts[start : start + count, :, : len(formula.parts)] = filled
    if not np.all(np.isfinite(parts)):
        raise StatisticsError("parts of items are not all finite", _HINT)
    if len({formula.outer for formula in formulas}) > 1:
        raise StatisticsError("perplexities and other metrics are averaged", "one --eval for each")
    return replace(items, parts=parts, formulas=tuple(formulas), sign=sign)


def _merged(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return groups as strata of two items or more, numbered from 0."""
    counts = np.bincount(groups)
    single = np.flatnonzero(counts == 1)
    if len(single) and len(counts) > 1:
        others = np.flatnonzero(counts > 1)
        into = others[np.argmin(counts[others])] if len(single) == 1 else single[0]
        groups = np.where(np.isin(groups, single), into, groups)
    return np.unique(groups, return_inverse=True)[1]


def _step(y: Array) -> float:
    """Return the smallest change along λ, rounding aside; 1 where no item changes."""
    gaps = np.diff(np.sort(y, axis=1), axis=1)
    gaps = gaps[gaps > TOLERANCE * np.ptp(y)]
    return float(gaps.min()) if gaps.size else 1.0


def _checked(items: Items, macro: Array, reported: Array, lams: Sequence[Lambda]) -> Items:
    """Return `items`, or a copy with weights `macro`, whichever makes up the reported values."""
    candidates = [items]
    if np.ptp(items.weights) == 0 and np.ptp(macro) > 0:
        candidates.insert(0, replace(items, weights=macro))
    for candidate in candidates:
        values = candidate.values()
        off = np.abs(values - reported)
        if np.all(off <= TOLERANCE * np.maximum(1.0, np.abs(reported))):
            return candidate
    worst = int(np.argmax(off))
    raise StatisticsError(
        f"the items do not make up the score: at λ = {lams[worst].key} they give "
        f"{abs(values[worst]):.6g}, and {abs(reported[worst]):.6g} is reported",
        _HINT,
    )


_HINT = (
    "an evaluator's items need Σ weight · score / Σ weight = value, or parts that make it up; "
    "see pa_fast.Item"
)

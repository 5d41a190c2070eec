"""Cross-fitted gain: λ is chosen on some items, and its gain measured on others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from pa_fast.stats.bands import LEVEL
from pa_fast.stats.choice import Smoother, choose, choose_near
from pa_fast.stats.curve import Curve, curve, spread
from pa_fast.stats.items import Array, Items

FOLDS, REPEATS = 5, 10


@dataclass(frozen=True)
class Half:
    """The λ chosen on one half of the items, and its gain over the reference on the other half.

    Attributes:
        lam: the λ that was chosen.
        gain, low, high: on the other half; a pointwise interval.
    """

    lam: float
    gain: float
    low: float
    high: float


def crossfit(
    items: Items,
    ref: int,
    whole: Curve | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> float:
    """Return the gain over λ number `ref` at the λ that is chosen without the items that measure
    it.

    Five folds within strata, ten times; seed 0. Each fold is scored at the λ that the other four
    choose, and the items of all folds together give the gain.

    Args:
        whole: `curve(items)`. For a metric with parts its covariance, scaled to the number of items
            in four folds, replaces a bootstrap of each.
        allowed: (K,) λ that may be chosen; all if not given.

    Cost: 50 times O(n K), without products of matrices, whose threads would contend.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    whole = whole or curve(items)
    smoother = Smoother(items.lams)
    gains = []
    for _ in range(REPEATS):
        fold = fold_numbers(items, FOLDS, rng)
        columns = np.empty(len(fold), int)
        for number in range(FOLDS):
            rest = fold != number
            if rest.any() and not rest.all():
                columns[~rest] = _chosen(items.take(rest), whole, len(fold), smoother, allowed)
        gains.append(_gain(items, columns, ref))
    return float(np.mean(gains))


def half_split(items: Items, ref: int, level: float = LEVEL) -> Half:
    """Choose λ on a random half of the items, and return its gain on the other half.

    The split is stratified, with seed 0. The interval is as wide as the simultaneous band on all
    items.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    first = fold_numbers(items, 2, rng) == 0
    chosen = choose(curve(items.take(first)))
    other = curve(items.take(~first))
    gain, se = other.s[chosen] - other.s[ref], other.se()[chosen, ref]
    width = float(ndtri((1 + level) / 2)) * se if chosen != ref else 0.0
    return Half(float(items.lams[chosen]), float(gain), float(gain - width), float(gain + width))


def fold_numbers(items: Items, folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return (n,) the fold of each item; folds have equal shares of each stratum and of all
    items."""
    number = np.arange(len(items.y)) % folds
    for start, count in zip(items.starts, items.counts):
        number[start : start + count] = rng.permutation(number[start : start + count])
    return number


def _chosen(
    part: Items,
    whole: Curve,
    n: int,
    smoother: Smoother,
    allowed: NDArray[np.bool_] | None,
) -> int:
    """Return the index of the λ that `part` of the `n` items chooses."""
    if part.parts is not None:
        scaled = replace(whole, s=part.values(), cov=whole.cov * (n / len(part.y)))
        return choose(scaled, smoother, allowed)
    s, deviations = spread(part)

    def se(best: int) -> Array:
        squared = ((deviations - deviations[:, [best]]) ** 2).sum(0)
        return np.sqrt(np.maximum(squared, part.floor**2))

    return choose_near(s, se, smoother, allowed)


def _gain(items: Items, columns: NDArray[np.int64], ref: int) -> float:
    """Return the value with each item scored at a λ of its own, less the value at `ref`."""
    rows = np.arange(len(columns))
    pair = np.stack([columns, np.full(len(columns), ref)], axis=1)
    parts = None if items.parts is None else items.parts[rows[:, None], pair]
    values: Array = replace(items, y=items.y[rows[:, None], pair], parts=parts).values()
    return float(values[0] - values[1])

"""The curve of a score along λ, and the covariance of its errors, from which bands are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pa_fast.errors import UsageError
from pa_fast.stats.items import Array, Items

REPLICATES = 2000
"""Bootstrap replicates for metrics that are no means of items."""

MOST_NUMBERS = 2**22  # numbers that a part of the bootstrap holds at once


@dataclass(frozen=True)
class Curve:
    """Scores at K λ, higher is better.

    Attributes:
        lams: (K,) ascending.
        s: (K,) scores.
        cov: (K, K) covariance of their errors.
        floor: least standard error of a difference, that of one item. Without it, λ that differ in
            few items would seem to differ in none: 85 % coverage at 200 items.
    """

    lams: Array
    s: Array
    cov: Array
    floor: float

    def se(self) -> Array:
        """Return (K, K) standard errors of s_j − s_k, at least `floor`."""
        variance = np.diag(self.cov)
        squared = variance[:, None] + variance - 2 * self.cov
        return np.sqrt(np.maximum(squared, self.floor**2))

    def select(self, indices: Sequence[int]) -> Curve:
        """Return the curve at the λ of these indices."""
        cov = self.cov[np.ix_(indices, indices)]
        return Curve(self.lams[indices], self.s[indices], cov, self.floor)


def curve(items: Items) -> Curve:
    """Return the curve of `items`.

    Of a mean, S = Σ_g w_g² Cov_g / n_g over strata g of n_g items with divisor n_g − 1; where
    weights differ within a stratum, Cov_g is that of its weighted mean's linearisation, and the
    same where they do not. Of a metric with parts, S is the covariance of 2,000 bootstrap
    replicates, drawn within strata with seed 0.

    Cost: O(n K²); with parts 2,000 times O(n K).
    """
    if items.parts is not None:
        return Curve(items.lams, items.values(), _bootstrap(items), items.floor)
    s, deviations = spread(items)
    return Curve(items.lams, s, deviations.T @ deviations, items.floor)


def spread(items: Items) -> tuple[Array, Array]:
    """Return (K,) scores of a mean, and (n, K) deviations D of its items from their stratum's mean,
    scaled so that S = DᵀD."""
    counts = items.counts
    sums = np.add.reduceat(items.weights[:, None] * items.y, items.starts)
    means = sums / np.add.reduceat(items.weights, items.starts)[:, None]
    scale = items.weights * np.repeat(np.sqrt(counts / np.maximum(counts - 1, 1)), counts)
    return sums.sum(0), (items.y - np.repeat(means, counts, axis=0)) * scale[:, None]


def _bootstrap(items: Items) -> Array:
    """Return the (K, K) covariance of the value over replicates of the items, resampled within
    strata."""
    assert items.parts is not None
    rng = np.random.Generator(np.random.PCG64(0))
    k, p = items.parts.shape[1:]
    strata = np.split(items.parts.reshape(-1, k * p), items.starts[1:])
    sums = (_resampled(stratum, rng).reshape(-1, k, p) for stratum in strata)
    return np.atleast_2d(np.cov(items.combined(sums), rowvar=False))


def _resampled(rows: Array, rng: np.random.Generator) -> Array:
    """Return (2000, …) sums of as many rows as there are, drawn with replacement."""
    count = len(rows)
    sums = np.empty((REPLICATES, rows.shape[1]))
    size = max(1, MOST_NUMBERS // count)
    for first in range(0, REPLICATES, size):
        times = min(size, REPLICATES - first)
        rows_drawn = rng.integers(0, count, (times, count)) + count * np.arange(times)[:, None]
        often = np.bincount(rows_drawn.ravel(), minlength=times * count).reshape(times, count)
        sums[first : first + times] = often @ rows
    return sums


def percent(whole: Curve, ref: int) -> Curve:
    """Return the curve of s(λ) / s(ref): 1 at `ref`.

    An item's value is (y(λ) − r·y(ref)) / s(ref), a linear function of its scores, so the new
    covariance is linear in S. Of several tasks it is the percentage of their mean, not the mean of
    percentages.

    Raises:
        UsageError: s(ref) is within three standard errors of 0.
    """
    unit = whole.s[ref]
    if abs(unit) < 3 * max(np.sqrt(whole.cov[ref, ref]), whole.floor):
        raise UsageError(
            f"the score {abs(unit):.4g} at λ = {whole.lams[ref]:g} is within three standard errors "
            "of 0: no percentage of it can be given"
        )
    ratio = whole.s / unit
    linear = np.eye(len(ratio))
    linear[:, ref] -= ratio
    linear /= unit
    return Curve(whole.lams, ratio, linear @ whole.cov @ linear.T, whole.floor / abs(unit))

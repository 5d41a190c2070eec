"""Two metrics: the λ that keep a share of one, and those that no other λ dominates on both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from pa_fast.stats.bands import DRAWS, LEVEL, draws
from pa_fast.stats.curve import Curve
from pa_fast.stats.items import Array


def kept(curve: Curve, ref: int, share: float, level: float = LEVEL) -> NDArray[np.bool_]:
    """Return (K,) whether λ significantly keeps at least `share` of the score at λ number `ref`.

    From `ref` downwards, a λ is kept while its score less `share` times that of `ref` is above 0 by
    1.645 standard errors of that difference; the first that is not ends the walk. `ref` itself
    always is. Of costs, and of other scores < 0, the share is that of the reciprocal: a perplexity
    is kept to 98 % up to 1/0.98 of it.
    """
    factor = share if curve.s[ref] >= 0 else 1 / share
    variance = np.diag(curve.cov) + factor**2 * curve.cov[ref, ref] - 2 * factor * curve.cov[ref]
    se = np.sqrt(np.maximum(variance, curve.floor**2))
    passed = curve.s - factor * curve.s[ref] - float(ndtri(level)) * se >= 0
    is_kept = np.zeros(len(passed), bool)
    is_kept[ref] = True
    for k in range(ref - 1, -1, -1):
        if not passed[k]:
            break
        is_kept[k] = True
    return is_kept


def undominated(curves: Sequence[Curve], level: float = LEVEL) -> NDArray[np.bool_]:
    """Return (K,) whether λ is on the Pareto frontier of several metrics, measured at the same λ.

    A λ is dominated only if another one is better on every metric by a one-sided max-t test of all
    pairs of λ on all metrics: point estimates lose a true member in 80 % of runs. Errors of
    different metrics are drawn independently.
    """
    errors = [curve.se() for curve in curves]
    size = len(curves[0].s)
    most = np.full(DRAWS, -np.inf)
    for seed, (curve, se) in enumerate(zip(curves, errors)):
        z = draws(curve.cov, seed=seed)
        for k in range(size):
            most = np.maximum(most, ((z - z[k]) / se[k, :, None]).max(0))
    c = np.quantile(most, level)
    better = np.ones((size, size), bool)
    for curve, se in zip(curves, errors):
        margin: Array = (curve.s[:, None] - curve.s) / se
        better &= margin > c
    return np.logical_not(better.any(0))

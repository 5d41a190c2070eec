"""Simultaneous bands along λ, and the set of λ that may be the best: both from draws of N(0, S)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pa_fast.stats.curve import Curve
from pa_fast.stats.items import Array

DRAWS = 20_000
LEVEL = 0.95


@dataclass(frozen=True)
class Band:
    """Differences to the score at one λ, with an interval that holds at all λ at once.

    Attributes:
        ref: the index of that λ.
        diff: (K,) s − s[ref].
        se: (K,) standard errors of `diff`; 0 at `ref`.
        c: half widths in standard errors.
        p: (K,) adjusted p of no difference, by the same maximum; 1 at `ref`.
    """

    ref: int
    diff: Array
    se: Array
    c: float
    p: Array

    @property
    def low(self) -> Array:
        return self.diff - self.c * self.se

    @property
    def high(self) -> Array:
        return self.diff + self.c * self.se


def draws(cov: Array, count: int = DRAWS, seed: int = 0) -> Array:
    """Return (K, count) draws of N(0, `cov`), the same on every machine up to rounding.

    Numerics: by Cholesky of S + 1e-10 · mean diagonal; eigenvectors differ between machines.
    """
    size = len(cov)
    ridge = 1e-10 * np.trace(cov) / size + 1e-300  # all scores alike: S is 0
    root = np.linalg.cholesky(cov + ridge * np.eye(size))
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal((count, size))
    return np.ascontiguousarray(root @ normal.T)


def band(curve: Curve, ref: int, z: Array, level: float = LEVEL) -> Band:
    """Return the band of differences to λ number `ref`: max-t over the other λ.

    Args:
        z: (K, M) `draws(curve.cov)`.
        level: the share of sweeps in which all true differences lie in the band.
    """
    others = np.arange(len(curve.s)) != ref
    diff, se = curve.s - curve.s[ref], np.where(others, curve.se()[:, ref], 0.0)
    if not others.any():
        return Band(ref, diff, se, 0.0, np.ones(1))
    most = np.abs((z[others] - z[ref]) / se[others, None]).max(0)
    c = float(np.quantile(most, level))
    p = np.ones(len(diff))
    reached = np.searchsorted(np.sort(most), np.abs(diff[others]) / se[others])
    p[others] = (1 + len(most) - reached) / (1 + len(most))
    return Band(ref, diff, se, c, p)


def best_set(curve: Curve, z: Array, level: float = LEVEL) -> NDArray[np.bool_]:
    """Return (K,) whether λ is in the set of λ*: a test of "no λ is better" at 1 − `level` keeps
    it.

    λ_k is kept unless max_j (s_j − s_k) / se_jk exceeds the `level` quantile of that maximum.

    Args:
        z: (K, M) `draws(curve.cov)`.
    """
    se = curve.se()
    keep = np.zeros(len(se), bool)
    for k in range(len(se)):
        most = ((z - z[k]) / se[k, :, None]).max(0)
        keep[k] = ((curve.s - curve.s[k]) / se[k]).max() <= np.quantile(most, level)
    return keep


def hull(keep: NDArray[np.bool_]) -> tuple[int, int]:
    """Return first and last index of the range of λ that holds the best one, as it is printed: from
    the last λ below the set to the first one above."""
    inside = np.flatnonzero(keep)
    return max(0, int(inside[0]) - 1), min(len(keep) - 1, int(inside[-1]) + 1)

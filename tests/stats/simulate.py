"""Simulated sweeps: item i is right at λ where μ(λ) + smooth_i(λ) + rough_i(λ) > 0.

Margins are exact: an item is right at λ with probability p(λ). Item effects are as on the demo
pair: some 3 % of the items change sides between neighbours of a grid of 21 λ.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from pa_fast.stats.items import Array, Items

ROUGH = 0.0156
SMOOTH = 0.235
LENGTH = 0.7


def peaked(gain: float, peak: float = 0.55) -> Callable[[Array], Array]:
    """A parabola that is 0.7 at λ = 1 and `gain` above it at `peak`."""
    return lambda x: 0.7 + gain - gain / (1 - peak) ** 2 * (x - peak) ** 2


def _plateau(x: Array) -> Array:
    left, right = np.clip((0.3 - x) / 0.3, 0, None), np.clip((x - 0.8) / 0.2, 0, None)
    return 0.72 - 0.04 * left**2 - 0.02 * right**2


def _asymmetric(x: Array) -> Array:
    left, right = 0.06 * ((0.3 - x) / 0.3) ** 2, 0.02 * ((x - 0.3) / 0.7) ** 2
    return 0.72 - np.where(x < 0.3, left, right)


SHAPES: dict[str, Callable[[Array], Array]] = {
    "peak +2": peaked(0.02),
    "peak +5": peaked(0.05),
    "asymmetric": _asymmetric,
    "monotone": lambda x: 0.7 - 0.1 * (1 - x) ** 2,
    "plateau": _plateau,
    "flat": lambda x: np.full(len(x), 0.7),
}


def grid(count: int) -> Array:
    """`count` λ from 0 to 1."""
    return np.arange(count) / (count - 1)


class Sweeps:
    """Sweeps over the λ `lams` whose true accuracy is `shape`."""

    def __init__(self, lams: Array, shape: Callable[[Array], Array]):
        self.lams, self.p = lams, shape(lams)
        apart = lams[:, None] - lams
        covariance = 1 - SMOOTH + SMOOTH * np.exp(-(apart**2) / (2 * LENGTH**2))
        values, vectors = np.linalg.eigh(covariance)
        large = values > 1e-10
        self._root = (vectors[:, large] * np.sqrt(values[large])).astype(np.float32)
        self._mean = (norm.ppf(self.p) * np.sqrt(1 + ROUGH**2)).astype(np.float32)

    def draw(self, rng: np.random.Generator, n: int) -> Items:
        """One sweep of `n` items of one task."""
        effects = rng.standard_normal((n, self._root.shape[1]), dtype=np.float32) @ self._root.T
        effects += np.float32(ROUGH) * rng.standard_normal(effects.shape, dtype=np.float32)
        return items_of((effects + self._mean > 0).astype(float), self.lams)


def items_of(y: Array, lams: Array | None = None) -> Items:
    """(n, K) scores of right or wrong as items of one task."""
    lams = grid(y.shape[1]) if lams is None else lams
    return Items(lams, y, np.full(len(y), 1 / len(y)), np.zeros(1, int), np.full(len(y), ""))

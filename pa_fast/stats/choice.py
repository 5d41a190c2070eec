"""The choice of λ: of those that score as well as the best, the one of the highest smoothed
score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pa_fast.stats.curve import Curve
from pa_fast.stats.items import Array

SCALES = (0.2, 0.35, 0.6)
AMPLITUDES = (0.5, 1.0, 2.0, 4.0)
RESIDUALS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Of the Gaussian process: length scales in λ; amplitudes and residuals in ranges of the scores."""


class Smoother:
    """A Gaussian process through scores at K λ with a white residual and a generalised mean.

    Scale, amplitude and residual are those of the highest marginal likelihood. The covariance of
    the items is not its noise: errors are nearly as smooth as the curve, and generalised least
    squares would then prefer λ that score visibly worse.

    Args:
        lams: (K,) where the scores are.

    Cost: 60 Cholesky factors, once; a curve then takes 60 products of a matrix and a vector.
    """

    def __init__(self, lams: Array):
        self.lams = lams
        grid = [(l, a, q) for l in SCALES for a in AMPLITUDES for q in RESIDUALS]  # noqa: E741
        self._scale, self._amplitude, residual = np.array(grid).T[:, :, None, None]
        noise = (residual**2 + 1e-8) * np.eye(len(lams))
        root = np.linalg.cholesky(self._kernel(lams) + noise)
        self._inverse = np.linalg.solve(root, np.broadcast_to(np.eye(len(lams)), root.shape))
        self._ones = self._inverse.sum(-1)
        self._square = (self._ones**2).sum(-1)
        logs = np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
        self._penalty = logs + 0.5 * np.log(self._square)

    def __call__(self, s: Array, lams: Array | None = None) -> Array:
        """Return (M,) smoothed scores `s` (K,) at the M λ `lams`; at the K λ themselves by
        default."""
        lams = self.lams if lams is None else lams
        unit = np.ptp(s)
        if unit == 0:
            return np.full(len(lams), s[0])
        white = self._inverse @ (s / unit)
        mean = (self._ones * white).sum(-1) / self._square
        rest = white - mean[:, None] * self._ones
        likelihood = -0.5 * (rest**2).sum(-1) - self._penalty
        best = np.flatnonzero(likelihood >= likelihood.max() - 1e-9)[0]  # the first of equal ones
        weights = rest[best] @ self._inverse[best]
        smoothed: Array = unit * (mean[best] + self._kernel(lams)[best] @ weights)
        return smoothed

    def _kernel(self, lams: Array) -> Array:
        """Return (60, M, K) covariances of the scores at `lams` and at the K λ."""
        covariance: Array = self._amplitude**2 * np.exp(
            -((lams[:, None] - self.lams) ** 2) / (2 * self._scale**2)
        )
        return covariance


def choose(
    curve: Curve,
    smoother: Smoother | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Return the index of λ̂, the λ to use, among those of `curve`.

    It has the highest smoothed score among the λ whose own score is within one paired standard
    error of the best score; of equal ones it is the λ nearest to 1.

    Args:
        smoother: of `curve.lams`, to avoid making it again.
        allowed: (K,) λ that may be chosen; all if not given. The others smooth the curve too.
    """
    smoother = smoother or Smoother(curve.lams)
    return choose_near(curve.s, lambda best: curve.se()[best], smoother, allowed)


def choose_near(
    s: Array,
    se: Callable[[int], Array],
    smoother: Smoother,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Return `choose` from scores `s` (K,) and `se`, a function from an index to the (K,) standard
    errors of differences to it: the choice needs one row of the covariance alone."""
    allowed = np.ones(len(s), bool) if allowed is None else allowed
    best = int(np.argmax(np.where(allowed, s, -np.inf)))
    allowance = se(best)
    allowance[best] = 0
    rounding = 1e-9 * max(np.ptp(s), 1e-300)
    near = allowed & (s[best] - s <= allowance + rounding)
    smoothed = np.where(near, smoother(s), -np.inf)
    top = np.flatnonzero(smoothed >= smoothed.max() - rounding)
    return int(top[np.argmin(np.abs(smoother.lams[top] - 1))])

"""Adaptive schedules: the next λ of `--lambdas auto`, a function of the recorded scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pa_fast.stats.bands import best_set, draws
from pa_fast.stats.choice import Smoother
from pa_fast.stats.curve import curve
from pa_fast.stats.items import Items

COARSE = tuple(k / 5 for k in range(6))
REFINED_STEP = 0.1
WIDEST_SET = 0.4
"""Widest set of λ* to refine: in a wider one only more items help, not more λ."""
LATTICE = 0.02
NEAR = 0.01
DRAWS = 4000


@dataclass(frozen=True)
class Next:
    """The λ to evaluate, with the reason; none where the schedule is done."""

    lams: tuple[float, ...]
    why: str


def first() -> Next:
    """Return the first λ of every adaptive schedule."""
    return Next(COARSE, "coarse grid")


def following(
    items: Items, others: Sequence[float] = (), allowed: NDArray[np.bool_] | None = None
) -> Next:
    """Return the λ to evaluate after `items`, which hold the coarse grid; at most 12 in all.

    It is a function of the scores at the λ of this schedule, in any order. Other λ that were
    evaluated change it only where one is beside the peak, which it replaces.

    Args:
        items: of the evaluator whose best λ is looked for.
        others: other λ that have a score: one beside the peak is returned in its place.
        allowed: (K,) the λ of `items` that may be chosen: the best is looked for among them, one
            step beyond, and no further. Of every λ above an allowed one it must be true.

    Raises:
        ValueError: a λ of the coarse grid is missing.
    """
    coarse = np.array([_index(items, lam) for lam in COARSE])
    if None in coarse:
        raise ValueError("the coarse grid is not complete")
    coarse = coarse.astype(int)
    if allowed is None:
        allowed = np.ones(len(items.lams), bool)
    coarse_curve = curve(items.select(coarse[allowed[coarse]]))
    inside = coarse_curve.lams[best_set(coarse_curve, draws(coarse_curve.cov, DRAWS))]
    low, high = float(inside[0]), float(inside[-1])
    if high - low > WIDEST_SET + 1e-9:
        return Next((), "too many may be the best for more λ to tell: it takes more items")
    steps = np.arange(
        max(0.0, low - REFINED_STEP), min(1.0, high + REFINED_STEP) + 1e-9, REFINED_STEP
    )
    fine = sorted({*COARSE, *(round(float(lam), 6) for lam in steps)})
    missing = tuple(lam for lam in fine if _index(items, lam) is None)
    if missing:
        return Next(missing, "a finer grid around the best")
    part = items.select(np.array([_index(items, lam) for lam in fine]))
    lattice = np.linspace(0.0, 1.0, round(1 / LATTICE) + 1)
    smooth = Smoother(part.lams)(part.values(), lattice)
    reach = items.lams[allowed].min() - 1e-9
    peak = round(float(lattice[np.argmax(np.where(lattice >= reach, smooth, -np.inf))]), 6)
    if np.abs(items.lams - peak).min() <= NEAR + 1e-9:
        return Next((), "the smoothed curve's peak is evaluated")
    beside = min(others, key=lambda lam: abs(lam - peak), default=np.inf)
    if abs(beside - peak) <= NEAR + 1e-9:
        return Next((beside,), "beside the smoothed curve's peak")
    return Next((peak,), "the smoothed curve's peak")


def _index(items: Items, lam: float) -> int | None:
    matches = np.flatnonzero(np.abs(items.lams - lam) < 1e-9)
    return int(matches[0]) if len(matches) else None

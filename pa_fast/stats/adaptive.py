"""Where to look next: the λ of `--lambdas auto`, a function of what is recorded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pa_fast.stats.bands import best_set, draws
from pa_fast.stats.choice import Smoother
from pa_fast.stats.curve import curve
from pa_fast.stats.items import Items

COARSE = tuple(k / 5 for k in range(6))
STEP = 0.1
WIDEST = 0.4
"""Of the set of λ*: over a wider one more λ tell nothing, only more items do."""
LATTICE = 0.02
NEAR = 0.01
DRAWS = 4000


@dataclass(frozen=True)
class Next:
    """λ to evaluate, and why; none where the schedule is done."""

    lams: tuple[float, ...]
    why: str


def first() -> Next:
    """The λ of every adaptive schedule."""
    return Next(COARSE, "coarse grid")


def following(items: Items) -> Next:
    """What to evaluate after `items`, which hold the coarse grid at least; at most 12 λ in all.

    A function of the scores at the λ of its own schedule: others that were evaluated do not change
    it, nor does the order.

    Raises:
        ValueError: a λ of the coarse grid is missing.
    """
    coarse = [_place(items, lam) for lam in COARSE]
    if None in coarse:
        raise ValueError("the coarse grid is not complete")
    found = curve(items.at(np.array(coarse)))
    inside = found.lams[best_set(found, draws(found.cov, DRAWS))]
    low, high = float(inside[0]), float(inside[-1])
    if high - low > WIDEST + 1e-9:
        return Next((), f"the best λ lies in {low:g}–{high:g}: more items, not more λ")
    steps = np.arange(max(0.0, low - STEP), min(1.0, high + STEP) + 1e-9, STEP)
    fine = sorted({*COARSE, *(round(float(lam), 6) for lam in steps)})
    missing = tuple(lam for lam in fine if _place(items, lam) is None)
    if missing:
        return Next(missing, f"the best λ lies in {low:g}–{high:g}")
    part = items.at(np.array([_place(items, lam) for lam in fine]))
    lattice = np.linspace(0.0, 1.0, round(1 / LATTICE) + 1)
    peak = round(float(lattice[np.argmax(Smoother(part.lams)(part.values(), lattice))]), 6)
    if np.abs(items.lams - peak).min() <= NEAR + 1e-9:
        return Next((), "the smoothed curve's peak is evaluated")
    return Next((peak,), "the smoothed curve's peak")


def _place(items: Items, lam: float) -> int | None:
    found = np.flatnonzero(np.abs(items.lams - lam) < 1e-9)
    return int(found[0]) if len(found) else None

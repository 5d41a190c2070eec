"""The adaptive schedule: a function of the scores, whatever else is recorded."""

from __future__ import annotations

import numpy as np
import pytest

from pa_fast.stats import adaptive
from pa_fast.stats.items import Items
from tests.stats.acceptance import adaptive_sweep
from tests.stats.simulate import SHAPES, Sweeps, grid, peaked


def sweep(n: int, shape: str = "peak +5", seed: int = 0) -> Items:
    return Sweeps(grid(51), SHAPES[shape]).draw(np.random.default_rng(seed), n)


def at(items: Items, lams: tuple[float, ...]) -> Items:
    return items.select(np.array([round(lam * 50) for lam in sorted(lams)]))


def test_the_coarse_grid_comes_first() -> None:
    assert adaptive.first().lams == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    with pytest.raises(ValueError, match="not complete"):
        adaptive.following(at(sweep(100), (0.0, 0.2)))


def test_more_λ_are_not_asked_for_where_only_items_help() -> None:
    done = adaptive.following(at(sweep(100, "flat"), adaptive.COARSE))
    assert done.lams == () and "it takes more items" in done.why


def test_a_narrow_set_is_refined_and_then_the_peak() -> None:
    items = sweep(20_000)
    fine = adaptive.following(at(items, adaptive.COARSE))
    assert fine.lams and all(round(10 * lam) % 2 for lam in fine.lams)
    peak = adaptive.following(at(items, adaptive.COARSE + fine.lams))
    assert len(peak.lams) <= 1 and peak.why
    lams, _ = adaptive_sweep(items)
    assert len(lams) <= 12 and lams == sorted(adaptive.COARSE + fine.lams + peak.lams)


def test_other_λ_that_are_recorded_do_not_change_the_next_ones() -> None:
    items = sweep(20_000)
    fine = adaptive.following(at(items, adaptive.COARSE))
    assert adaptive.following(at(items, (*adaptive.COARSE, 0.02, 0.94))) == fine
    half = adaptive.following(at(items, adaptive.COARSE + fine.lams[:1]))
    assert half.lams == fine.lams[1:] and half.why == fine.why


@pytest.mark.parametrize("peak", [0.0, 0.98])
def test_a_peak_at_an_end_stays_within_0_and_1(peak: float) -> None:
    items = Sweeps(grid(51), peaked(0.1, peak)).draw(np.random.default_rng(0), 20_000)
    lams, _ = adaptive_sweep(items)
    assert min(lams) == 0 and max(lams) == 1 and len(lams) <= 12

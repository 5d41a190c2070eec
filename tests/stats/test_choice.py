"""The chosen λ and its cross-fitted gain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast.stats import crossfit as module
from pa_fast.stats.choice import Smoother, choose
from pa_fast.stats.crossfit import crossfit, half_split
from pa_fast.stats.curve import Curve, curve
from pa_fast.stats.items import FORMULAS, Items
from tests.stats.simulate import SHAPES, Sweeps, grid

LAMS = grid(11)


def some(seed: int, n: int = 400, shape: str = "peak +5") -> Items:
    return Sweeps(LAMS, SHAPES[shape]).draw(np.random.default_rng(seed), n)


def likelihood(s: np.ndarray, scale: float, amplitude: float, residual: float) -> float:
    """Log-likelihood of `s` with its mean integrated out, written out plainly."""
    apart = LAMS[:, None] - LAMS
    cov = amplitude**2 * np.exp(-(apart**2) / (2 * scale**2)) + (residual**2 + 1e-8) * np.eye(11)
    inverse, ones = np.linalg.inv(cov), np.ones(11)
    mean = ones @ inverse @ s / (ones @ inverse @ ones)
    rest = s - mean
    terms = [rest @ inverse @ rest, np.linalg.slogdet(cov)[1], np.log(ones @ inverse @ ones)]
    return -0.5 * float(sum(terms))


def test_the_smoothed_curve_is_the_likeliest_process_s() -> None:
    from itertools import product

    from pa_fast.stats.choice import AMPLITUDES, RESIDUALS, SCALES

    s = some(1).values()
    unit = np.ptp(s)
    best = max(product(SCALES, AMPLITUDES, RESIDUALS), key=lambda h: likelihood(s / unit, *h))
    scale, amplitude, residual = best
    at = np.array([0.13, 0.9])
    near = amplitude**2 * np.exp(-((LAMS[:, None] - LAMS) ** 2) / (2 * scale**2))
    far = amplitude**2 * np.exp(-((at[:, None] - LAMS) ** 2) / (2 * scale**2))
    inverse = np.linalg.inv(near + (residual**2 + 1e-8) * np.eye(11))
    mean = inverse.sum(0) @ s / inverse.sum()
    assert Smoother(LAMS)(s, at) == pytest.approx(mean + far @ inverse @ (s - mean), rel=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 999), st.floats(0.01, 100), st.floats(-5, 5))
def test_the_unit_of_a_score_does_not_change_the_choice(
    seed: int, scale: float, shift: float
) -> None:
    found = curve(some(seed))
    other = Curve(LAMS, scale * found.s + shift, scale**2 * found.cov, scale * found.floor)
    assert choose(found) == choose(other)


@settings(max_examples=25)
@given(st.integers(0, 999))
def test_the_chosen_λ_scores_within_one_standard_error_of_the_best(seed: int) -> None:
    found = curve(some(seed, 100))
    best, chosen = int(np.argmax(found.s)), choose(found)
    assert chosen == best or found.s[best] - found.s[chosen] <= found.se()[best, chosen] + 1e-9


def test_equal_scores_choose_the_λ_nearest_to_1() -> None:
    flat = Curve(LAMS, np.full(11, 0.5), np.eye(11), 0.1)
    assert choose(flat) == 10
    beyond = replace(flat, lams=LAMS + 0.22)
    assert beyond.lams[choose(beyond)] == pytest.approx(1.02)


def test_a_visibly_worse_λ_is_not_chosen_however_smooth_the_curve_is_there() -> None:
    s = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0, 0.6, 0.5, 0.4, 0.3])
    assert choose(Curve(LAMS, s, 1e-8 * np.eye(11), 1e-4)) in (5, 7)


def reference_crossfit(items: Items, ref: int) -> float:
    """Cross-fit of a mean over items of one stratum, item by item."""
    rng = np.random.Generator(np.random.PCG64(0))
    n = len(items.y)
    gains = []
    for _ in range(10):
        fold = rng.permutation(np.arange(n) % 5)
        for number in range(5):
            part = replace(items, y=items.y[fold != number])
            part = replace(part, weights=np.full(len(part.y), 1 / len(part.y)))
            chosen = choose(curve(part))
            gains += list(items.y[fold == number, chosen] - items.y[fold == number, ref])
    return float(np.mean(gains))


def test_the_cross_fitted_gain_is_measured_on_items_that_did_not_choose() -> None:
    items = some(2, 203)
    assert crossfit(items, 10) == pytest.approx(reference_crossfit(items, 10), abs=1e-12)


def test_a_ratio_of_sums_is_cross_fitted_as_the_mean_that_it_is() -> None:
    items = some(3, 300)
    parts = np.stack([items.y, np.ones_like(items.y)], axis=-1)
    ratio = replace(items, parts=parts, formulas=FORMULAS[:1])
    assert crossfit(ratio, 10) == pytest.approx(crossfit(items, 10), abs=0.01)


def test_folds_are_stratified_also_where_strata_are_small() -> None:
    sizes = np.full(40, 3)
    y = np.zeros((120, 2))
    items = Items(grid(2), y, np.full(120, 1 / 120), np.cumsum(sizes) - sizes, np.full(120, ""))
    fold = module.fold_numbers(items, 5, np.random.default_rng(0))
    assert np.bincount(fold).tolist() == [24] * 5
    assert all(len(set(fold[start : start + 3])) == 3 for start in items.starts)


def test_strata_count_the_same_in_the_gain() -> None:
    # a gain in the small stratum alone: half of the macro mean
    small, large = np.tile([1.0, 0.0], (50, 1)), np.tile([1.0, 1.0], (950, 1))
    weights = np.repeat([0.5 / 50, 0.5 / 950], [50, 950])
    items = Items(
        grid(2), np.concatenate([small, large]), weights, np.array([0, 50]), np.full(1000, "")
    )
    assert crossfit(items, 1) == pytest.approx(0.5)


def test_nothing_is_gained_where_nothing_differs() -> None:
    items = replace(some(0), y=np.ones((400, 11)))
    assert crossfit(items, 10) == 0


def test_a_half_split_chooses_on_one_half_and_reports_on_the_other() -> None:
    found = half_split(some(4, 4000), 10)
    assert found.low < found.gain < found.high and 0.2 <= found.lam <= 0.9
    assert found == half_split(some(4, 4000), 10)
    # on the choosing half λ = 0.5 is right where λ = 1 is wrong, on the other half the reverse
    items = some(0, 200)
    first = module.fold_numbers(items, 2, np.random.Generator(np.random.PCG64(0))) == 0
    y = np.zeros((200, 11))
    y[first, 5] = y[~first, 10] = 1
    assert half_split(replace(items, y=y), 10).gain == pytest.approx(-1)


def test_only_λ_that_are_allowed_are_chosen() -> None:
    items = some(0, 2000)
    allowed = LAMS >= 0.8
    assert choose(curve(items), allowed=allowed) == 8
    # the best score of all does not bound the allowed ones: they lie far below it
    s = np.array([0.9, 0.9, 0.1, 0.2, 0.1, 0, 0, 0, 0, 0, 0])
    found = Curve(LAMS, s, 1e-8 * np.eye(11), 1e-6)
    assert choose(found, allowed=s < 0.5) == 3
    assert crossfit(items, 10, None, allowed) < crossfit(items, 10)
    assert crossfit(items, 10, None, LAMS == 1) == 0

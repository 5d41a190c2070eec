"""The curve and its covariance: its formulas written out, and what must not change it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast.errors import UsageError
from pa_fast.stats.curve import curve, percent
from pa_fast.stats.items import FORMULAS, Items
from tests.stats.simulate import SHAPES, Sweeps, grid, items_of

LAMS = grid(5)


def stratified(seed: int, sizes: list[int], shares: list[float] | None = None) -> Items:
    """Items of strata of `sizes`, which count `shares` (default: the same each)."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([Sweeps(LAMS, SHAPES["peak +5"]).draw(rng, size).y for size in sizes])
    shares = [1 / len(sizes)] * len(sizes) if shares is None else shares
    weights = np.concatenate([np.full(n, share / n) for n, share in zip(sizes, shares)])
    groups = np.repeat([str(k) for k in range(len(sizes))], sizes)
    return Items(LAMS, y, weights, np.cumsum(sizes) - sizes, groups)


@pytest.mark.parametrize("shares", [None, [0.2, 0.5, 0.3]])
def test_the_covariance_is_that_of_a_stratified_mean(shares: list[float] | None) -> None:
    sizes = [40, 2, 25]
    items = stratified(0, sizes, shares)
    found = curve(items)
    s, cov = np.zeros(5), np.zeros((5, 5))
    for start, n, share in zip(items.starts, sizes, shares or [1 / 3] * 3):
        y = items.y[start : start + n]
        s += share * y.mean(0)
        cov += share**2 * np.cov(y, rowvar=False) / n
    assert found.s == pytest.approx(s, abs=1e-14)
    assert found.cov == pytest.approx(cov, abs=1e-16)
    assert found.floor == max(w / n for w, n in zip(shares or [1 / 3] * 3, sizes))


def test_unequal_weights_within_a_stratum_are_a_weighted_mean_s_linearisation() -> None:
    # many sweeps of few items: the spread of the weighted mean is what its covariance says
    weights = np.linspace(1, 5, 60) / np.linspace(1, 5, 60).sum()
    simulated = Sweeps(LAMS, SHAPES["peak +5"])
    values, variances = [], []
    for seed in range(600):
        items = simulated.draw(np.random.default_rng(seed), 60)
        found = curve(replace(items, weights=weights))
        values.append(found.s)
        variances.append(np.diag(found.cov))
    assert np.mean(variances, 0) == pytest.approx(np.var(values, 0), rel=0.2)


@settings(max_examples=25)
@given(st.integers(0, 99), st.floats(0.01, 100), st.floats(-3, 3))
def test_a_shifted_or_scaled_score_is_a_shifted_or_scaled_curve(
    seed: int, scale: float, shift: float
) -> None:
    items = stratified(seed, [20, 30])
    found, other = curve(items), curve(replace(items, y=scale * items.y + shift))
    assert other.s == pytest.approx(scale * found.s + shift)
    assert other.cov == pytest.approx(scale**2 * found.cov, rel=1e-6, abs=1e-12)


def test_standard_errors_of_differences_have_a_floor() -> None:
    items = items_of(np.repeat(np.arange(2.0), 25)[:, None] * np.ones((1, 3)))
    assert curve(items).se() == pytest.approx(np.full((3, 3), 1 / 50)), "no item differs"


def as_ratio(items: Items) -> Items:
    """The same mean, as a ratio of sums."""
    parts = np.stack([items.y, np.ones_like(items.y)], axis=-1)
    return replace(items, parts=parts, formulas=FORMULAS[:1] * len(items.starts))


def test_the_bootstrap_of_a_mean_has_its_covariance() -> None:
    items = stratified(3, [300, 200])
    plain, drawn = curve(items), curve(as_ratio(items))
    assert drawn.s == pytest.approx(plain.s)
    assert np.diag(drawn.cov) == pytest.approx(np.diag(plain.cov), rel=0.12)
    assert drawn.se()[0] == pytest.approx(plain.se()[0], rel=0.12)
    assert np.array_equal(drawn.cov, curve(as_ratio(items)).cov), "with a fixed seed"


def test_the_bootstrap_in_parts_is_the_bootstrap_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    items = as_ratio(stratified(3, [30, 20]))
    whole = curve(items)
    monkeypatch.setattr("pa_fast.stats.curve.MOST_NUMBERS", 70)
    assert np.array_equal(curve(items).cov, whole.cov)


def test_the_error_of_f1_is_its_spread_over_sweeps() -> None:
    rng = np.random.default_rng(0)
    f1 = next(one for one in FORMULAS if one.parts == ("tp", "fp", "fn"))
    values, errors = [], []
    for _ in range(150):
        gold, said = rng.random((200, 1)) < 0.4, rng.random((200, 1)) < 0.5
        parts = np.stack([gold & said, ~gold & said, gold & ~said], axis=-1).astype(float)
        found = curve(replace(items_of(parts[..., 0], np.zeros(1)), parts=parts, formulas=(f1,)))
        values.append(found.s[0])
        errors.append(np.sqrt(found.cov[0, 0]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_percent_is_the_items_own_linearisation() -> None:
    items = stratified(5, [60, 40])
    found = percent(curve(items), 4)
    s = items.values()
    linear = (items.y - (s / s[4]) * items.y[:, [4]]) / s[4]
    assert found.s == pytest.approx(s / s[4]) and found.s[4] == 1
    assert found.cov == pytest.approx(curve(replace(items, y=linear)).cov, abs=1e-16)
    assert found.cov[4] == pytest.approx(np.zeros(5), abs=1e-16)
    assert found.floor == pytest.approx(items.floor / s[4])


def test_nothing_is_a_percentage_of_a_score_near_0() -> None:
    items = items_of((np.arange(100)[:, None] < np.array([50, 4])).astype(float))
    percent(curve(items), 0)
    with pytest.raises(
        UsageError, match=r"the score 0.04 at λ = 1 is within three standard errors"
    ):
        percent(curve(items), 1)


def test_some_λ_of_a_curve() -> None:
    items = stratified(0, [9, 9])
    part, expected = curve(items).select([1, 4]), curve(items.select([1, 4]))
    assert np.array_equal(part.s, expected.s) and part.floor == expected.floor
    assert part.cov == pytest.approx(expected.cov)

"""Bands and the set of λ*: what they must hold and what they must be, whatever the scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pa_fast.stats.bands import band, best_set, draws, hull
from pa_fast.stats.curve import Curve, curve
from tests.stats.simulate import SHAPES, Sweeps, grid

LAMS = grid(6)


def some(seed: int, n: int = 150) -> Curve:
    return curve(Sweeps(LAMS, SHAPES["peak +5"]).draw(np.random.default_rng(seed), n))


def test_draws_have_the_covariance_that_was_asked_for() -> None:
    cov = some(0).cov
    z = draws(cov, 100_000)
    assert z.shape == (6, 100_000) and np.array_equal(z, draws(cov, 100_000))
    assert np.cov(z) == pytest.approx(cov, abs=0.02 * cov.max())
    assert not np.array_equal(z, draws(cov, 100_000, seed=1))


@pytest.mark.parametrize("cov", [np.zeros((3, 3)), np.ones((3, 3)), np.diag([1.0, 0.0, 2.0])])
def test_draws_of_singular_covariances(cov: np.ndarray) -> None:
    assert np.cov(draws(cov)) == pytest.approx(cov, abs=0.05)


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from(range(6)))
def test_a_band_and_its_p_say_the_same(seed: int, ref: int) -> None:
    found = some(seed)
    held = band(found, ref, draws(found.cov, 4000))
    assert held.diff[ref] == held.low[ref] == held.high[ref] == 0 and held.p[ref] == 1
    told = (held.low > 0) | (held.high < 0)
    others = np.arange(6) != ref
    near = np.abs(held.p - 0.05) < 0.002  # p counts draws, c lies between two of them
    assert np.array_equal(told[others & ~near], held.p[others & ~near] < 0.05)
    assert np.all((held.p > 0) & (held.p <= 1)) and 1.9 < held.c < 3.5


@settings(max_examples=15)
@given(st.integers(0, 999), st.floats(0.001, 1000))
def test_the_unit_of_a_score_does_not_matter(seed: int, unit: float) -> None:
    found = some(seed)
    other = Curve(found.lams, unit * found.s, unit**2 * found.cov, unit * found.floor)
    ours = band(found, 5, draws(found.cov, 2000))
    theirs = band(other, 5, draws(other.cov, 2000))
    assert theirs.c == pytest.approx(ours.c, rel=1e-6)
    assert theirs.high == pytest.approx(unit * ours.high, rel=1e-6)
    sets = [best_set(one, draws(one.cov, 2000)) for one in (found, other)]
    assert np.array_equal(*sets)


@settings(max_examples=25)
@given(st.integers(0, 999))
def test_the_set_holds_the_best_score_and_grows_with_the_level(seed: int) -> None:
    found = some(seed)
    z = draws(found.cov, 4000)
    keep = best_set(found, z)
    assert keep[np.argmax(found.s)]
    assert np.all(best_set(found, z, level=0.8) <= keep)
    assert np.all(keep <= best_set(found, z, level=0.99))


def test_the_set_of_many_items_is_the_best_λ_alone_and_of_equal_scores_all() -> None:
    found = some(0, 20_000)
    far = replace(found, s=np.array([0.0, 0.1, 0.2, 0.9, 0.3, 0.1]))
    assert np.flatnonzero(best_set(far, draws(far.cov))).tolist() == [3]
    same = replace(found, s=np.full(6, 0.5))
    assert best_set(same, draws(same.cov)).all()


def test_a_single_λ_and_items_that_never_change() -> None:
    one = Curve(np.ones(1), np.array([0.5]), np.array([[1e-4]]), 1e-3)
    assert best_set(one, draws(one.cov)).tolist() == [True]
    held = band(one, 0, draws(one.cov))
    assert (held.c, held.diff.tolist(), held.p.tolist()) == (0.0, [0.0], [1.0])
    still = Curve(LAMS, np.full(6, 0.5), np.zeros((6, 6)), 1e-3)
    assert best_set(still, draws(still.cov)).all()
    assert band(still, 5, draws(still.cov)).high.max() < 1e-3


def test_the_printed_range_reaches_to_the_excluded_neighbours() -> None:
    keep = np.array([False, False, True, False, True, False])
    assert hull(keep) == (1, 5)
    assert hull(np.ones(6, bool)) == (0, 5)
    assert hull(LAMS == 1.0) == (4, 5)

"""The acceptance figures: quick ones of few sweeps, and every row as `python -m` prints it."""

from __future__ import annotations

import pytest

from tests.stats import acceptance


def test_two_λ_are_a_paired_t_test() -> None:
    apart, c = acceptance.two_lambdas()
    assert apart < 1e-9 and abs(c - 1.96) <= 0.02


def test_ten_rivals_are_dunnett_s() -> None:
    assert abs(acceptance.ten_rivals() - 2.7) <= 0.03


def test_bands_need_the_floor_of_one_item() -> None:
    assert 0.9 <= acceptance.coverage_of_bands(200, 100) <= 0.99
    assert acceptance.coverage_of_bands(200, 100, floor=False) < 0.9


def test_the_set_covers_and_shrinks_with_items() -> None:
    covered, size = acceptance.coverage_of_sets("peak +5", 5000, 30)
    assert covered >= 0.92 and size <= 6.5


def test_the_cross_fitted_gain_is_nearly_unbiased() -> None:
    honest, own, covered = acceptance.bias_and_band("peak +2", 1000, 60)
    assert abs(honest) <= 0.3 < own and covered >= 0.95


def test_an_adaptive_sweep_loses_little_and_asks_for_little() -> None:
    lost, _, used = acceptance.losses(1000, 20)
    assert (lost <= 0.5).mean() >= 0.9 and used.mean() <= 0.25 * 51 and used.max() <= 12


@pytest.mark.slow
def test_every_acceptance_row() -> None:
    failed = [row for row in acceptance.rows() if not row.holds]
    assert not failed

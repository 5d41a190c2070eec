"""λ that keep a share of a score, and λ that none dominates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pa_fast.stats.curve import Curve
from pa_fast.stats.frontier import kept, undominated
from tests.stats.simulate import grid

LAMS = grid(6)


def exact(s: list[float], se: float = 1e-4, floor: float = 1e-6) -> Curve:
    return Curve(grid(len(s)), np.array(s), se**2 * np.eye(len(s)), floor)


def test_the_walk_from_1_ends_at_the_first_λ_that_fails() -> None:
    found = exact([0.99, 0.5, 0.985, 0.99, 1.0, 1.0])
    assert kept(found, 5, 0.98).tolist() == [False, False, True, True, True, True]
    assert kept(found, 5, 0.995).tolist() == [False] * 4 + [True] * 2
    assert kept(found, 3, 0.98).tolist() == [False, False, True, True, False, False]


def test_a_share_must_be_told_from_less() -> None:
    assert kept(exact([0.99, 1.0]), 1, 0.98).tolist() == [True, True]
    few = exact([0.99, 1.0], se=0.01)
    assert kept(few, 1, 0.98).tolist() == [False, True], "λ = 1 keeps all of itself"
    assert kept(replace(exact([0.99, 1.0]), floor=0.01), 1, 0.98).tolist() == [False, True]


def test_a_cost_is_kept_up_to_the_reciprocal_of_the_share() -> None:
    assert kept(exact([-10.25, -10.2, -10.0]), 2, 0.98).tolist() == [False, True, True]


def test_the_margin_is_1_645_standard_errors_of_the_difference() -> None:
    se = np.sqrt(1 + 0.9**2 - 2 * 0.9 * 0.5)  # of y(λ) − 0.9 y(1), correlated by one half
    for gap, told in ((1.64, False), (1.65, True)):
        cov = np.array([[1.0, 0.5], [0.5, 1.0]])
        found = Curve(grid(2), np.array([90 + gap * se, 100.0]), cov, 1e-6)
        assert kept(found, 1, 0.9).tolist() == [told, True]


def test_a_λ_is_dominated_where_another_is_better_on_every_metric() -> None:
    first, second = exact([0.1, 0.5, 0.4, 0.3]), exact([0.1, 0.2, 0.3, 0.1])
    assert undominated([first, second]).tolist() == [False, True, True, False]
    assert undominated([first]).tolist() == [False, True, False, False]


def test_a_difference_within_its_error_does_not_dominate() -> None:
    assert undominated([exact([0.5, 0.51], se=0.01), exact([0.1, 0.9])]).tolist() == [True, True]
    assert undominated([exact([0.5, 0.6], se=0.01), exact([0.1, 0.9])]).tolist() == [False, True]

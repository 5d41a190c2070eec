"""bench/auto.py: what it says of `--lambdas auto`, on a tiny pair."""

from __future__ import annotations

from pathlib import Path

import pytest

import pa_fast
from bench import auto
from bench.synthetic import write_pair


def test_it_measures_what_the_live_weights_act_like(tmp_path: Path) -> None:
    engine = pa_fast.load(*write_pair(tmp_path / "pair", "tiny", auto.DELTA))
    (found,) = auto.measured(engine, 20_000, 5.0, 1)
    assert 6 < found.used <= 12 and 0 <= found.lost < 0.5
    assert abs(found.chosen - found.peak) < 0.1
    assert auto.row(20_000, [found]).count("|") == len(auto.HEAD) + 1


def test_weights_that_act_like_another_λ_end_it(tmp_path: Path) -> None:
    engine = pa_fast.load(*write_pair(tmp_path / "pair", "tiny", auto.DELTA / 100))
    with pytest.raises(RuntimeError, match="live weights act like λ"):
        list(auto.measured(engine, 200, 5.0, 1))

"""`Generation`: greedy unless it says otherwise, within its ranges, and refused by who cannot
sample."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.own_engine import Bigram, BigramEngine
from pa_fast import Generation
from pa_fast.errors import EngineError, UsageError
from pa_fast.evals import build

COUNTS = st.integers(1, 1000)
TEMPERATURES = st.floats(0, 1e6, exclude_min=True)
SHARES = st.floats(0, 1, exclude_min=True)
SEEDS = st.none() | st.integers(0, 2**63 - 1)
NO_NUMBERS = st.sampled_from([None, True, "1", 1j, [1], math.nan, math.inf, -math.inf])
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "n": NO_NUMBERS | st.integers(max_value=0) | st.floats(),
    "temperature": NO_NUMBERS | st.floats(max_value=0, exclude_max=True) | st.integers(-9, -1),
    "top_p": NO_NUMBERS | st.floats(max_value=0) | st.floats(1, exclude_min=True),
    "seed": NO_NUMBERS.filter(bool) | st.integers(max_value=-1) | st.integers(2**63) | st.floats(),
}


@given(COUNTS, TEMPERATURES, SHARES, SEEDS)
def test_what_is_in_range_is_kept_and_samples(
    n: int, temperature: float, top_p: float, seed: int | None
) -> None:
    config = Generation(8, (2,), n, temperature, top_p, seed)
    assert (config.n, config.temperature, config.top_p, config.seed) == (
        n,
        temperature,
        top_p,
        seed,
    )
    assert not config.is_greedy
    with pytest.raises(EngineError, match="Mine cannot sample") as refused:
        config.check_greedy("Mine")
    assert f"temperature = {temperature}, n = {n}, top_p = {top_p}, seed = {seed}" in str(
        refused.value
    )


@given(st.data(), st.sampled_from(sorted(WRONG)), SEEDS)
def test_what_is_out_of_range_is_refused_by_name_and_value(
    data: st.DataObject, name: str, seed: int | None
) -> None:
    value = data.draw(WRONG[name])
    given_ = {"temperature": 0.5, "seed": seed, name: value}
    with pytest.raises(UsageError, match=rf"^{name} = ") as refused:
        Generation(8, **given_)
    assert str(value)[:60] in str(refused.value)


@given(SEEDS)
def test_greedy_is_the_default_and_the_same_whatever_the_seed(seed: int | None) -> None:
    config = Generation(8, seed=seed)
    assert config.is_greedy and (config.n, config.top_p) == (1, 1.0)
    config.check_greedy("Mine")
    assert Generation(8) == Generation(8, (), 1, 0, 1, None)


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("top_p", 0.9)])
def test_what_greedy_decoding_would_ignore_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} = {value} does nothing at temperature 0"):
        Generation(8, **{name: value})  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_numbers() -> None:
    config = Generation(8, (), np.int64(3), np.float32(0.5), Fraction(1, 2), np.int64(7))  # type: ignore[arg-type]
    assert not config.is_greedy


def test_an_engine_of_ones_own_refuses_too() -> None:
    engine = BigramEngine(Bigram("ab"), Bigram("AB"))
    assert len(engine.generate([[97], [98]], Generation(2, seed=3))) == 2
    with pytest.raises(EngineError, match="BigramEngine cannot sample"):
        engine.generate([[97]], Generation(2, temperature=1.0))


def test_run_folders_of_greedy_evaluators_are_gone_on_with(tmp_path: Path) -> None:
    """Their identity is to the letter what it was before configurations could sample."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "prompt": "2 + 2 =", "answer": "4"}), encoding="utf-8")
    assert getattr(build(f"generate:{rows}", limit=3, seed=5), "identity") == {  # noqa: B009
        "evaluator": "generate",
        "chat": False,
        "max_new_tokens": "256 at most",
        "check": None,
        "check_sha256": None,
        "regex": None,
        "overflow": "refuse",
        "average": "macro",
        "limit": 3,
        "seed": 5,
        "sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
    }

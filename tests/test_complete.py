"""What a caller implements is enough: `complete` adds the rest, and nothing but that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.base import (
    CompleteEngine,
    CompleteEvaluator,
    CompleteWeights,
    Generation,
    Score,
    complete,
    complete_evaluator,
)
from pa_fast.errors import UsageError
from tests.evals.toy import Characters
from tests.sweep.fakes import FakeWeights


class Least:
    """An engine of the five members, and of no others: not even a dictionary for more."""

    __slots__ = ("tokenizer", "weights")

    def __init__(self) -> None:
        self.weights: Any = FakeWeights()
        self.tokenizer: Any = Characters()

    def loglikelihood(self, pairs: Any) -> list[Any]:
        return [pa_fast.Continuation(-float(self.weights.lam), False) for _ in pairs]

    def generate(self, prompts: Any, config: Generation) -> list[list[int]]:
        return [list(config.stop) for _ in prompts]

    def on_weights_changed(self) -> None: ...


class Count:
    """An evaluator of the three members."""

    name, higher_is_better = "count", True

    def __call__(self, engine: pa_fast.Engine) -> Score:
        assert isinstance(engine, Least) and isinstance(engine, pa_fast.Engine)
        return Score(-engine.loglikelihood([([1], [2])])[0].logprob, "nats", 1)


def public(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]


def test_an_engine_of_five_members_has_them_all() -> None:
    engine = Least()
    full = complete(engine)
    assert all(hasattr(full, name) for name in public(CompleteEngine))
    assert all(hasattr(full.weights, name) for name in public(CompleteWeights))
    assert full.identity == full.configuration == {} and full.notes == ()
    assert full.model is full.positions is full.on_progress is None
    assert full.stop_tokens == (Characters.eos_token_id,)
    assert full.weights.rule is full.weights.followed is None
    full.weights.check_lambda(1e30)
    full.weights.set_lambda(0.25)
    assert engine.weights.lam == full.weights.intended_lambda() == 0.25
    engine.weights.lam = None
    assert math.isnan(full.weights.intended_lambda())
    full.on_progress = print
    assert full.on_progress is print and not hasattr(engine, "on_progress")
    assert repr(full) == repr(engine) and complete(full) is full
    with pytest.raises(AttributeError, match="Least"):
        full.prefix  # type: ignore[attr-defined]  # noqa: B018


def test_what_is_there_is_taken_and_set_where_it_is() -> None:
    class More(Least):
        identity, on_progress = {"base": "b"}, None

    engine = More()
    full = complete(engine)
    assert full.identity == {"base": "b"}
    full.on_progress = print
    assert engine.on_progress is print  # type: ignore[comparison-overlap]


def test_an_evaluator_of_three_members_has_them_all(tmp_path: Path) -> None:
    full = complete_evaluator(Count())
    assert all(hasattr(full, name) for name in public(CompleteEvaluator))
    engine = complete(Least())
    assert full.identity == {} and full.check(engine) is None and full.name == "count"
    assert complete_evaluator(full) is full
    result = pa_fast.sweep(Least(), "0,0.5", [Count()], tmp_path / "run", figure=False)
    assert [row.score for row in result.rows] == [0.0, 0.5]


def test_what_has_no_default_must_be_there() -> None:
    class Mute:
        weights = tokenizer = None

    with pytest.raises(UsageError, match="a Mute is not an engine"):
        complete(Mute())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a Mute is not an evaluator"):
        complete_evaluator(Mute())  # type: ignore[arg-type]

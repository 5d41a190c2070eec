"""Evaluators as a notebook gives them: strings, suites, functions, objects, one or many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pa_fast
from pa_fast.base import Engine, Score
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import evaluator, evaluators
from tests.sweep.fakes import FakeEngine, Scorer

ENGINE: Any = FakeEngine()


def half(engine: Engine) -> float:
    return 0.5


def loss(engine: Engine) -> dict[str, float]:
    return {"loss": engine.weights.lam or 0.0}


loss.higher_is_better = False  # type: ignore[attr-defined]
loss.identity = {"data": 3}  # type: ignore[attr-defined]


def dressed(engine: Engine) -> float:
    return 0.25


dressed.name, dressed.higher_is_better = "in a dress", True  # type: ignore[attr-defined]


class Meter:
    """No evaluator: it has no name."""

    def __call__(self, engine: Engine) -> float:
        return 1.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "suite.yaml").write_text(
        "- perplexity:notes.txt,name=one\n- perplexity:notes.txt,name=two\n"
    )
    (tmp_path / "single.yml").write_text("- perplexity:notes.txt\n")
    return tmp_path


def test_every_kind_side_by_side(data: Path) -> None:
    scorer = Scorer("object")
    given = [
        f"perplexity:{data}/notes.txt",
        data / "suite.yaml",
        str(data / "single.yml"),
        half,
        scorer,
    ]
    found = evaluators([*given[:2], half, scorer])
    assert [one.name for one in found] == ["perplexity:notes", "one", "two", "half", "object"]
    assert found[-1] is scorer
    assert evaluator(given[2]).name == "perplexity:notes"


@pytest.mark.parametrize(
    "one", [half, Scorer("half"), "perplexity:{}/notes.txt,name=half", Path("single.yml")]
)
def test_one_instead_of_a_list(data: Path, one: Any) -> None:
    one = one.format(data) if isinstance(one, str) else data / one if isinstance(one, Path) else one
    assert [found.name for found in evaluators(one)] == [
        "perplexity:notes" if isinstance(one, Path) else "half"
    ]


def test_names(data: Path) -> None:
    assert evaluator(f"perplexity:{data}/notes.txt,name=a", name="b").name == "b"
    assert evaluator(lambda engine: 1.0, name="one").name == "one"
    assert evaluator(dressed).name == "in a dress" and evaluator(dressed)(ENGINE).value == 0.25
    for nameless in (lambda engine: 1.0, functools.partial(half), Meter()):
        with pytest.raises(UsageError, match="has no name") as caught:
            evaluator(nameless)
        assert "name=" in (caught.value.hint or "")
        assert "lambda" not in caught.value.message or "a lambda function" in caught.value.message
    with pytest.raises(UsageError, match="has a name of its own"):
        evaluator(Scorer("a"), name="b")
    with pytest.raises(UsageError, match="lists 2 evaluators"):
        evaluator(data / "suite.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [(3, "int is not"), (None, "NoneType is not"), (Meter, "class Meter is not")],
)
def test_what_is_no_evaluator(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluators([given])
    with pytest.raises(UsageError, match=message):
        evaluators(given)


def test_identity_and_direction() -> None:
    made = evaluator(loss)
    assert made.higher_is_better is False and evaluator(half).higher_is_better is True
    assert made.identity["data"] == 3 and len(made.identity["sha256"]) == 64
    assert made.identity["sha256"] != evaluator(half).identity["sha256"]
    space: dict[str, Any] = {}
    exec("def typed(engine): return 1.0", space)
    assert evaluator(space["typed"]).identity["sha256"] is None


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (0.5, Score(0.5, "score", 1)),
        (1, Score(1.0, "score", 1)),
        (Fraction(1, 2), Score(0.5, "score", 1)),
        (np.float32(0.5), Score(0.5, "score", 1)),
        (torch.tensor(0.5), Score(0.5, "score", 1)),
        (np.array([0.5]), Score(0.5, "score", 1)),
        ({"score": 0.5, "n": 3}, Score(0.5, "score", 1, details={"n": 3.0})),
        ({"value": torch.tensor(0.5), "loss": 2}, Score(0.5, "score", 1, details={"loss": 2.0})),
        ({"accuracy": 0.5}, Score(0.5, "accuracy", 1)),
        (Score(0.5, "share", 2), Score(0.5, "share", 2)),
    ],
)
def test_what_a_function_may_return(returned: Any, expected: Score) -> None:
    score = evaluator(lambda engine: returned, name="f")(ENGINE)
    assert score == expected and type(score.value) is float


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (True, "returned True"),
        (np.bool_(True), "expected a finite number"),
        (torch.tensor(True), "expected a finite number"),
        ("0.5", "returned a str"),
        (b"0.5", "returned a bytes"),
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        (None, "returned a NoneType"),
        (1j, "returned a complex"),
        (torch.zeros(2), "returned a Tensor"),
        ([0.5], "returned a list"),
        ({}, "a dict of nothing"),
        ({"a": 1.0, "b": 2.0}, "a dict of `a`, `b`: which is the score"),
        ({"score": 0.5, "note": "fine"}, "whose `note` is 'fine'"),
        ({"score": True}, "whose `score` is True"),
        ({"score": 0.5, "loss": float("nan")}, "whose `loss` is nan"),
        (Score(float("nan"), "share", 1), "Score.value is nan"),
        (Score(True, "share", 1), "Score.value is True"),
    ],
)
def test_what_it_may_not(returned: Any, message: str) -> None:
    with pytest.raises(EvaluatorError, match=message):
        evaluator(lambda engine: returned, name="f")(ENGINE)


def test_a_check_of_a_function_is_asked_before_the_first_λ(tmp_path: Path) -> None:
    def doomed(engine: Engine) -> float:
        raise AssertionError("it was run")

    def check(engine: Engine) -> None:
        raise EvaluatorError("it would fail at every λ")

    doomed.check = check  # type: ignore[attr-defined]
    with pytest.raises(EvaluatorError, match="would fail at every"):
        pa_fast.sweep(ENGINE, "0", doomed, tmp_path / "run", figure=False)


def test_a_sweep_of_functions_and_objects(tmp_path: Path) -> None:
    functions: list[Callable[[Engine], Any]] = [half, loss]
    result = pa_fast.sweep(
        FakeEngine(),
        np.linspace(0, 1, 11),
        [*functions, Scorer("a")],
        tmp_path / "run",
        figure=False,
    )
    assert result.evaluators == ("half", "loss", "a") and not result.failures
    assert [lam.key for lam in result.lambdas] == [lam.key for lam in pa_fast.lambdas("0:1:0.1")]
    best = result.best("loss")
    assert best is not None and best.lam.key == "0"
    assert pa_fast.SweepResult.load(str(tmp_path / "run")) == result
    one = pa_fast.sweep(FakeEngine(), 0.5, half, tmp_path / "one", figure=False)  # type: ignore[arg-type]
    assert one.best() == one.rows[0]

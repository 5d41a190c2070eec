"""`python:module:function`: the user's own evaluator."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from pa_fast.base import Item
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import build
from tests.evals.toy import ToyEngine

SOURCE = """
from pa_fast.base import Item, Score

def mean(engine):
    return Score(0.5, "share", 2, [Item("a", "g", 0.0), Item("b", "g", 1.0)])

def cost(engine):
    return Score(engine.loglikelihood([([1], [5])])[0].logprob, "nats", 1)
cost.higher_is_better = False
cost.identity = {"version": 3}

def number(engine):
    return 0.5

def text(engine):
    return "0.5"

def infinite(engine):
    return Score(float("inf"), "share", 2)

def text_value(engine):
    return Score("0.5", "share", 2)

def numpy_value(engine):
    import numpy
    return Score(numpy.float32(0.25), "share", 2)

def no_count(engine):
    return Score(0.5, "share", None)

def bare_items(engine):
    return Score(0.5, "share", 1, [0.5])

def breaks(engine):
    raise KeyError("the user's own mistake")

constant = 5
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a fresh module in the current directory, which is not on the path yet."""
    name = f"scores_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/nowhere")
    return name


def test_numbers_of_other_libraries_are_scores(module: str) -> None:
    score = build(f"python:{module}:numpy_value")(ToyEngine())
    assert score.value == 0.25 and type(score.value) is float


def test_a_bare_number_is_a_score(module: str) -> None:
    score = build(f"python:{module}:number")(ToyEngine())
    assert (score.value, score.unit, score.n) == (0.5, "score", 1)


def test_imported_from_the_current_directory(module: str) -> None:
    evaluator = build(f"python:{module}:mean")
    assert (evaluator.name, evaluator.higher_is_better) == ("python:mean", True)
    score = evaluator(ToyEngine())
    assert (score.value, score.items) == (0.5, [Item("a", "g", 0.0), Item("b", "g", 1.0)])


def test_attributes_of_the_function(module: str) -> None:
    evaluator = build(f"python:{module}:cost,name=my cost")
    assert (evaluator.name, evaluator.higher_is_better) == ("my cost", False)
    assert evaluator(ToyEngine(lambda context, token: -token / 10)).value == -0.5
    assert evaluator.identity["version"] == 3
    assert len(evaluator.identity["sha256"]) == 64
    json.dumps(evaluator.identity)


def test_identity_follows_the_source(module: str, tmp_path: Path) -> None:
    first = build(f"python:{module}:mean").identity
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("# another reading\n")
    assert build(f"python:{module}:mean").identity != first


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("text", "returned a str, expected a finite number, a dict of them or a Score"),
        ("infinite", "Score.value is inf"),
        ("text_value", "Score.value is '0.5'"),
        ("no_count", "n None"),
        ("bare_items", "Score.items holds a float"),
    ],
)
def test_what_comes_back_is_checked(module: str, function: str, message: str) -> None:
    evaluator = build(f"python:{module}:{function}")
    with pytest.raises(EvaluatorError, match=message):
        evaluator(ToyEngine())


def test_the_users_own_error_passes_through(module: str) -> None:
    with pytest.raises(KeyError, match="own mistake"):
        build(f"python:{module}:breaks")(ToyEngine())


@pytest.mark.parametrize("target", ["module", "module:", ":function"])
def test_a_target_without_its_half(target: str) -> None:
    with pytest.raises(UsageError, match="is not module:function"):
        build(f"python:{target}")


def test_modules_and_functions_that_are_not_there(module: str, tmp_path: Path) -> None:
    with pytest.raises(
        EvaluatorError, match="`not_a_module_of_ours` does not import: ModuleNotFoundError"
    ):
        build("python:not_a_module_of_ours:score")
    with pytest.raises(EvaluatorError, match="is nothing, expected a function"):
        build(f"python:{module}:median")
    with pytest.raises(EvaluatorError, match="is a int, expected a function"):
        build(f"python:{module}:constant")
    (tmp_path / f"{module}_broken.py").write_text("1 / 0\n")
    with pytest.raises(EvaluatorError, match="ZeroDivisionError"):
        build(f"python:{module}_broken:score")

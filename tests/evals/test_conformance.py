"""The conformance table of evaluators: what each kind must do. Adding one means adding a row."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable

import pytest

import pa_fast
from examples.demo import follow
from pa_fast.base import CompleteEvaluator, Evaluator, Score, complete_evaluator
from pa_fast.evals import build
from pa_fast.evals.spec import KINDS
from pa_fast.stats import Evaluation, analyse
from tests.evals.harness_tasks import DEMO, PAIR, write_tasks

LIMIT = 12


def instructions(folder: pathlib.Path) -> str:
    (folder / "alpaca.json").write_text(
        json.dumps([{"instruction": text} for text in ("rev owgny", "rev yopnlu")])
    )
    return f"alpaca:{folder / 'alpaca.json'},max_new_tokens=8"


def documents(folder: pathlib.Path) -> str:
    lines = (DEMO / "README.md").read_text(encoding="utf-8").split("\n\n")[:8]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in lines))
    return f"perplexity:{folder / 'texts.jsonl'},window=128"


ROWS: dict[str, list[Callable[[pathlib.Path], str]]] = {
    "perplexity": [documents],
    "icl": [
        lambda folder: f"icl:{DEMO / 'fewshot.jsonl'},shots=3,sep=\\n",
        lambda folder: f"icl:{DEMO / 'fewshot.jsonl'},shots=2,sep=\\n,average=micro",
        lambda folder: f"icl:{DEMO / 'fewshot.jsonl'},shots=3,sep=\\n,mode=generate",
    ],
    "generate": [lambda folder: f"generate:{DEMO / 'requests.jsonl'},max_new_tokens=8"],
    "alpaca": [instructions],
    "lm-eval": [
        lambda folder: f"lm-eval:t_choice,t_answer,include_path={write_tasks(folder / 't')}"
    ],
    "python": [lambda folder: "python:examples.demo.follow:follow"],
}
CASES = [
    pytest.param(make, id=f"{kind}-{number}")
    for kind, makes in ROWS.items()
    for number, make in enumerate(makes)
]


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the user's own has no `limit`."""
    monkeypatch.setattr(follow, "ROWS", follow.ROWS[::50])


@pytest.fixture(scope="module")
def lm() -> pa_fast.LambdaModel:
    return pa_fast.load(*PAIR, device="cpu", batch_size=LIMIT)


def made(make: Callable[[pathlib.Path], str], folder: pathlib.Path) -> CompleteEvaluator:
    if "lm-eval" in (text := make(folder)):
        pytest.importorskip("lm_eval")
    evaluator = build(text, limit=LIMIT)
    assert isinstance(evaluator, Evaluator)
    return complete_evaluator(evaluator)


class Scored:
    """An evaluator of the table and what it says at three λ; the checksum of the weights at the
    first one, before it has seen them."""

    def __init__(
        self,
        make: Callable[[pathlib.Path], str],
        lm: pa_fast.LambdaModel,
        folder: pathlib.Path,
    ):
        self.evaluator = made(make, folder)
        lm.set_lambda(0.5)
        self.before = lm.weights.checksum()
        self.notes = list(self.evaluator.check(lm) or ())
        self.count = self.evaluator.item_count(lm)
        self.scores: dict[float, Score] = {}
        for lam in (0.5, 0.0, 1.0):
            lm.set_lambda(lam)
            self.scores[lam] = self.evaluator(lm)


@pytest.fixture(scope="module")
def scored(
    lm: pa_fast.LambdaModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[pathlib.Path], str]], Scored]:
    """A row of the table, scored once for all tests."""
    return functools.cache(lambda make: Scored(make, lm, tmp_path_factory.mktemp("row")))


def test_every_kind_of_evaluator_has_a_row() -> None:
    assert ROWS.keys() == KINDS.keys()


@pytest.mark.parametrize("make", CASES)
def test_an_evaluator(
    make: Callable[[pathlib.Path], str],
    lm: pa_fast.LambdaModel,
    scored: Callable[[Callable[[pathlib.Path], str]], Scored],
) -> None:
    row = scored(make)
    evaluator, scores, count = row.evaluator, row.scores, row.count
    assert evaluator.name and isinstance(evaluator.higher_is_better, bool)
    json.dumps(dict(evaluator.identity))
    assert all(isinstance(note, str) for note in row.notes)
    lm.set_lambda(0.5)
    assert lm.weights.checksum() == row.before, "the weights are left alone"
    again = evaluator(lm)
    assert again == scores[0.5], "the same λ has the same score, items and files"
    for score in scores.values():
        assert math.isfinite(score.value) and score.unit
        assert 0 < score.n == len(score.items) and count in (None, score.n)
        names = [(item.group, item.id) for item in score.items]
        assert len(set(names)) == len(names)
        assert names == [(item.group, item.id) for item in again.items], "the same items at every λ"
        weights = [item.weight for item in score.items]
        assert weights == [item.weight for item in again.items] and min(weights) > 0
        assert all(math.isfinite(item.score) for item in score.items)
        assert all(math.isfinite(figure) for figure in score.details.values())
        assert all(isinstance(text, str) and "/" not in name for name, text in score.files.items())


@pytest.mark.parametrize("make", CASES)
def test_the_items_make_up_the_score(
    make: Callable[[pathlib.Path], str],
    scored: Callable[[Callable[[pathlib.Path], str]], Scored],
) -> None:
    row = scored(make)
    evaluator, scores = row.evaluator, {f"{lam:g}": score for lam, score in row.scores.items()}
    answer = analyse([Evaluation.of(evaluator.name, scores, evaluator.higher_is_better)])
    assert answer.sentence
    assert not answer.objective.refused, "intervals come from items that make up the score"


@pytest.mark.parametrize("make", CASES)
def test_a_seed_draws_the_same_items_again(
    make: Callable[[pathlib.Path], str], tmp_path: pathlib.Path
) -> None:
    text = make(tmp_path)
    if "lm-eval" in text:
        pytest.importorskip("lm_eval")
    first, again = (complete_evaluator(build(text, limit=LIMIT, seed=3)) for _ in range(2))
    assert first.identity == again.identity and first.name == again.name

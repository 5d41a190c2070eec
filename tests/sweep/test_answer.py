"""The answer of a run folder: items as they are kept, read back, and what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from pa_fast.base import Engine, Item, Lambda, Score
from pa_fast.errors import RunError, UsageError
from pa_fast.stats import Evaluation, analyse
from pa_fast.stats.items import Column
from pa_fast.sweep import sweep
from pa_fast.sweep.results import SweepResult
from tests.sweep.fakes import FakeEngine, Scorer

SIZES = {"short": 60, "long": 140}


class Judge:
    """Right or wrong by a fixed level of each item, better at λ near `peak`: the macro mean, or
    with `counts` an F1 of each group, by size."""

    higher_is_better = True

    def __init__(self, name: str, peak: float, *, counts: bool = False):
        self.name, self.peak, self.counts = name, peak, counts
        rng = np.random.default_rng(len(name))
        self.levels = {group: rng.random(size) for group, size in SIZES.items()}

    def __call__(self, engine: Engine) -> Score:
        lam = engine.weights.lam
        assert lam is not None
        chance = 0.9 - 0.5 * (lam - self.peak) ** 2
        items = []
        for group, levels in self.levels.items():
            for k, level in enumerate(levels):
                right = float(level < chance)
                parts: Mapping[str, float] | None = None
                if self.counts:
                    parts = {"tp": right, "fp": 1 - right, "fn": 1 - right}
                weight = 1 if self.counts else 100 / SIZES[group]
                items.append(Item(f"q{k}", group, right, weight, parts))
        value = sum(i.weight * i.score for i in items) / sum(i.weight for i in items)
        if self.counts:
            value = sum(
                np.mean([i.score for i in items if i.group == group]) * size / 200
                for group, size in SIZES.items()
            )
        return Score(float(value), "share", len(items), items)


def run(out: Path, *evaluators: Judge | Scorer) -> SweepResult:
    return sweep(FakeEngine(), "0:1:0.1", list(evaluators), out, figure=False)


def test_items_are_kept_with_their_weights_and_parts(tmp_path: Path) -> None:
    judge, counts = Judge("macro", 0.4), Judge("counts", 0.4, counts=True)
    result = run(tmp_path, judge, counts)
    engine = FakeEngine()
    engine.weights.set_lambda(0.3)
    for evaluation, evaluator in zip(result.evaluations(), (judge, counts)):
        kept = evaluation.column(Lambda("0.3"))
        assert kept == Column.of(evaluator(engine))
        assert len(evaluation.values) == 11 and evaluation.unit == "share"
    assert any(kept.parts)
    line = json.loads((tmp_path / "items" / "lambda=0.3.macro.jsonl").read_text().split("\n")[0])
    assert line == {"id": "q0", "group": "short", "score": line["score"], "weight": 100 / 60}
    plain = run(tmp_path / "plain", Scorer("plain"))
    assert plain.evaluations()[0].column(Lambda("0.3")).weights == [1.0] * 4
    line = json.loads((plain.out / "items" / "lambda=0.3.plain.jsonl").read_text().split("\n")[0])
    assert set(line) == {"id", "group", "score"}, "as earlier versions wrote it"


def test_a_run_folder_says_what_results_in_memory_say(tmp_path: Path) -> None:
    judge, other = Judge("objective", 0.5), Judge("rising score", 1.0)
    result = run(tmp_path, judge, other)
    memory = []
    for evaluator in (judge, other):
        engine, scores = FakeEngine(), {}
        for lam in result.lambdas:
            engine.weights.set_lambda(lam)
            scores[lam] = evaluator(engine)
        memory.append(Evaluation.of(evaluator.name, scores))
    ours, theirs = result.answer(), analyse(memory)
    assert ours.sentence == theirs.sentence and list(ours.rows()) == list(theirs.rows())
    loaded = SweepResult.load(tmp_path).answer("rising score", {"objective": 0.9})
    assert loaded.objective.name == "rising score" and loaded.chosen == 1
    assert loaded.allowed is not None and loaded.keep == {"objective": 0.9}


def test_an_older_run_folder_of_macro_means_still_answers(tmp_path: Path) -> None:
    result = run(tmp_path, Judge("macro", 0.4))
    expected = result.answer()
    for path in (tmp_path / "items").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        old = [{key: row[key] for key in ("id", "group", "score")} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in old))
    found = SweepResult.load(tmp_path).answer()
    assert found.sentence == expected.sentence and found.gain == pytest.approx(expected.gain)


def test_a_run_is_recorded_where_the_statistics_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is lent may not have scipy, and its sweep must not end with an error."""
    monkeypatch.setitem(sys.modules, "pa_fast.stats", None)
    result = sweep(FakeEngine(), "0,1", [Scorer("a")], tmp_path, figure=False)
    assert len(result.rows) == 2
    said = json.loads((tmp_path / "results.json").read_text())["answer"]
    assert said == {"sentence": "No answer can be given: pa_fast.stats is not installed."}


def test_a_number_without_items_is_answered_without_intervals(tmp_path: Path) -> None:
    def number(engine: Engine) -> Score:
        return Score(1 - (float(engine.weights.lam or 0) - 0.7) ** 2, "share", 1)

    judge = Judge("x", 0.4)
    judge.__class__ = type("Number", (Judge,), {"__call__": lambda self, engine: number(engine)})
    answer = run(tmp_path, judge).answer()
    assert answer.chosen == Lambda("0.7") and answer.gain is None
    assert answer.sentence == (
        "λ = 0.7 scores best on x, 1: the score has no items, so no interval can be given."
    )


def test_a_run_without_points_has_no_answer(tmp_path: Path) -> None:
    def fail(engine: Engine) -> None:
        raise ValueError("no")

    result = run(tmp_path, Scorer("x", act=fail))
    with pytest.raises(UsageError, match="no evaluator"):
        result.answer()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.write_text('{"id": "q0"}\n'), "is damaged"),
        (lambda path: path.write_text("{"), "is damaged"),
        (lambda path: path.write_text('{"id": "q", "group": "g", "score": null}'), "is damaged"),
        (lambda path: path.write_bytes(b"\xff"), "is damaged"),
    ],
)
def test_damaged_items_are_named(damage: object, message: str, tmp_path: Path) -> None:
    result = run(tmp_path, Judge("macro", 0.4))
    damage(tmp_path / "items" / "lambda=0.3.macro.jsonl")  # type: ignore[operator]
    with pytest.raises(RunError, match=message) as error:
        result.answer()
    assert "lambda=0.3.macro.jsonl" in str(error.value) and "runs again" in str(error.value.hint)


def test_a_journal_that_names_another_file_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", Judge("macro", 0.4))
    (tmp_path / "mine.jsonl").write_text("")
    journal = tmp_path / "run" / "journal.jsonl"
    name = "items/lambda=0.3.macro.jsonl"
    journal.write_text(journal.read_text().replace(name, "items/../../mine.jsonl"))
    with pytest.raises(RunError, match="not in the folder of items"):
        SweepResult.load(tmp_path / "run").answer()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item("a", "g", 1.0, float("inf")), "weighted item `a` inf"),
        (Item("a", "g", 1.0, parts={"tp": float("nan")}), "gave item `a` parts that are no finite"),
    ],
)
def test_items_that_are_no_numbers_fail_their_point(
    item: Item, message: str, tmp_path: Path
) -> None:
    judge = Judge("x", 0.4)
    score = Score(1.0, "u", 1, [item])
    judge.__class__ = type("Bad", (Judge,), {"__call__": lambda self, engine: score})
    result = run(tmp_path, judge)
    assert message in result.failures[0].error

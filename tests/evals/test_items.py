"""Items make up the reported value, whatever the evaluator, its average and its groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pa_fast.base import Item, Lambda, Score
from pa_fast.errors import StatisticsError
from pa_fast.evals import build
from pa_fast.stats.items import Column, collect
from tests.evals.harness_tasks import DEMO
from tests.evals.toy import Characters, ToyEngine

SIZES = {"a": 5, "b": 3, "c": 2}
GROUPS = [group for group, size in SIZES.items() for _ in range(size)]


def check(score: Score, higher_is_better: bool) -> None:
    """The items are those that `value` is made of: by their weights, or by their parts."""
    found = collect({Lambda("0.5"): Column.of(score)}, higher_is_better)
    assert abs(found.values()[0]) == pytest.approx(score.value, rel=1e-9)
    if found.parts is None:
        total = sum(item.weight for item in score.items)
        mean = sum(item.weight * item.score for item in score.items) / total
        assert mean == pytest.approx(score.value, abs=1e-9), "by their own weights"


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(kind: str) -> list[dict[str, Any]]:
    return {
        "icl": [
            {
                "prompt": f"{k}:",
                "choices": ["a", "aq", "s"],
                "answer": ["a", "aq"][k % 2],
                "group": g,
            }
            for k, g in enumerate(GROUPS)
        ],
        "generate": [
            {"prompt": f"{k}:", "regex": "a" if k % 3 else ".", "group": g}
            for k, g in enumerate(GROUPS)
        ],
        "alpaca": [{"instruction": f"do {k}", "dataset": g} for k, g in enumerate(GROUPS)],
        "perplexity": [{"text": "xyz" * (k + 1) + g, "group": g} for k, g in enumerate(GROUPS)],
    }[kind]


EVALS = {
    "icl": "icl:{file},shots=0",
    "icl, letter": "icl:{file},shots=0,mode=letter",
    "icl, generate": "icl:{file},shots=0,mode=generate,max_new_tokens=3",
    "generate": "generate:{file},max_new_tokens=3",
    "alpaca": "alpaca:{file},chat=false,max_new_tokens=3",
    "perplexity": "perplexity:{file},window=8",
}


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("name", EVALS)
def test_items_make_up_the_value(name: str, average: str, tmp_path: Path) -> None:
    file = written(tmp_path / "data.jsonl", rows_of(name.partition(",")[0]))
    evaluator = build(EVALS[name].format(file=file) + f",average={average}")
    # an answer of 0 to 3 letters, of which the last is cut, by the digit in the prompt
    score = evaluator(ToyEngine(says=lambda prompt: "aqr"[: sum(map(ord, prompt)) % 4]))
    assert score.value > 0 and len({item.score for item in score.items}) > 1
    check(score, evaluator.higher_is_better)
    weights = {item.weight for item in score.items}
    assert name == "perplexity" or (len(weights) > 1) == (average == "macro")


def test_groups_of_one_size_need_no_weights(tmp_path: Path) -> None:
    rows = [row | {"group": "ab"[k % 2]} for k, row in enumerate(rows_of("icl"))]
    evaluator = build(f"icl:{written(tmp_path / 'data.jsonl', rows)},shots=0")
    score = evaluator(ToyEngine(tokenizer=Characters()))
    assert {item.weight for item in score.items} == {1.0}
    check(score, True)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_items_of_lm_eval_tasks_make_up_their_mean(tasks: Path, engine: Any, average: str) -> None:
    engine.set_lambda(0.4)
    evaluator = build(f"lm-eval:t_choice,t_likelihood,include_path={tasks},average={average}")
    score = evaluator(engine)
    check(score, True)
    assert all(item.parts is None for item in score.items)


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("t_likelihood", "perplexity"),
        ("t_rolling", "word_perplexity"),
        ("t_rolling", "bits_per_byte"),
    ],
)
def test_items_of_lm_eval_perplexities_carry_their_parts(
    tasks: Path, engine: Any, task: str, metric: str
) -> None:
    engine.set_lambda(0.4)
    evaluator = build(f"lm-eval:{task},include_path={tasks},metric={metric}")
    score = evaluator(engine)
    assert all(item.parts for item in score.items) and not evaluator.higher_is_better
    check(score, False)


_BINARY = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: {metric}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def binary(lm_eval: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of two choices, scored by F1, Matthews' correlation and accuracy; and of three."""
    folder = tmp_path_factory.mktemp("binary")
    lines = (DEMO / "fewshot.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("split") != "pool"]
    for name, metric, count in (("b_f1", "f1", 24), ("b_mcc", "mcc", 20), ("b_acc", "acc", 12)):
        data = []
        for k, row in enumerate(rows[:count]):
            wrong = next(choice for choice in row["choices"] if choice != row["answer"])
            pair = [row["answer"], wrong][:: 1 if k % 3 else -1]
            label = pair.index(row["answer"])
            data.append({"prompt": row["prompt"], "choices": pair, "label": label})
        written(folder / f"{name}.jsonl", data)
        text = _BINARY.format(name=name, folder=folder, metric=metric)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    data = [
        {"prompt": row["prompt"], "choices": row["choices"], "label": k % len(row["choices"])}
        for k, row in enumerate(rows[:12])
    ]
    written(folder / "m_mcc.jsonl", data)
    text = _BINARY.format(name="m_mcc", folder=folder, metric="mcc")
    (folder / "m_mcc.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("names", ["b_f1", "b_mcc", "b_f1,b_mcc,b_acc"])
def test_items_of_f1_and_matthews_carry_their_counts(
    binary: Path, engine: Any, names: str, average: str
) -> None:
    engine.set_lambda(0.4)
    score = build(f"lm-eval:{names},include_path={binary},average={average}")(engine)
    assert all(item.parts for item in score.items)
    check(score, True)


def test_a_metric_whose_parts_are_not_known_has_no_intervals(binary: Path, engine: Any) -> None:
    engine.set_lambda(0.4)
    score = build(f"lm-eval:m_mcc,include_path={binary}")(engine)
    assert not any(item.parts for item in score.items)
    with pytest.raises(StatisticsError, match="the items do not make up the score"):
        check(score, True)


def test_the_items_of_a_number_are_none() -> None:
    with pytest.raises(StatisticsError, match="no items"):
        check(Score(0.5, "u", 1), True)
    with pytest.raises(StatisticsError, match="1 item"):
        check(Score(0.5, "u", 1, [Item("a", "g", 0.5)]), True)

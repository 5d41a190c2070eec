"""AlpacaEval's file: the rows that a judge reads, one generator at each λ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.base import Lambda
from pa_fast.errors import EvaluatorError
from pa_fast.evals import build
from pa_fast.evals.alpaca import lambda_text
from tests.evals.toy import Characters, Chatting, ToyEngine

ROWS: list[dict[str, Any]] = [
    {
        "instruction": " Say λ.\n",
        "dataset": "helpful_base",
        "datasplit": "eval",
        "output": "not ours",
        "generator": "theirs",
    },
    {"instruction": "Count.", "id": 7},
]


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_model_outputs(tmp_path: Path) -> None:
    evaluator = build(f"alpaca:{write(tmp_path / 'set.json', ROWS)},max_new_tokens=4")
    pair = {"base": "models/Llama-8B/", "instruct": "org/Llama-8B-Instruct"}
    engine = ToyEngine(
        tokenizer=Chatting(),
        says=lambda prompt: "λ!" if "λ" in prompt else "one, two",
        lam=0.35,
        configuration=pair,
    )
    score = evaluator(engine)
    assert engine.tokenizer.decode(engine.prompted[0][0]) == "\x01<user> Say λ.\n<assistant>"
    generator = "Llama-8B+Llama-8B-Instruct@lam=0.3500"
    assert json.loads(score.files["model_outputs.json"]) == [
        {
            "instruction": " Say λ.\n",
            "output": "λ!",
            "generator": generator,
            "dataset": "helpful_base",
            "datasplit": "eval",
        },
        {
            "instruction": "Count.",
            "output": "one,",
            "generator": generator,
            "dataset": "set",
            "datasplit": "eval",
        },
    ]
    assert (score.value, score.unit, score.n) == (0.5, "share of answers that end, macro", 2)
    assert [(item.id, item.group, item.score) for item in score.items] == [
        ("1", "helpful_base", 1.0),
        ("7", "set", 0.0),
    ]
    assert score.details == {"truncated": 0.5, "mean_output_tokens": 3.0}


def test_without_template_and_with_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "set.json", ROWS)
    engine = ToyEngine(tokenizer=Characters(bos=False), lam=1 / 3)
    score = build(f"alpaca:{path},chat=false,generator=mine")(engine)
    assert engine.tokenizer.decode(engine.prompted[0][1]) == "Count."
    assert {row["generator"] for row in json.loads(score.files["model_outputs.json"])} == {
        "mine@lam=0.3333333333333333"
    }
    assert json.loads(build(f"alpaca:{path},chat=false")(engine).files["model_outputs.json"])[0][
        "generator"
    ].startswith("pair@")
    assert build(f"alpaca:{path},generator=mine").identity != build(f"alpaca:{path}").identity
    with pytest.raises(EvaluatorError, match="no chat template"):
        build(f"alpaca:{path}")(engine)


def test_no_two_lambdas_share_a_name() -> None:
    points = [
        Lambda(text)
        for text in (
            "0",
            "1",
            "0.3",
            "0.30001",
            "0.12345",
            "1/3",
            "2/3",
            "-0.5",
            "1e-7",
            "1.0000000001",
        )
    ]
    assert [lambda_text(lam) for lam in points[:4]] == ["0.0000", "1.0000", "0.3000", "0.30001"]
    assert len({lambda_text(lam) for lam in points}) == len(points)


NUMBERS = st.floats(-3, 3) | st.integers(-30000, 30000).map(lambda number: number / 10000)


@given(NUMBERS, NUMBERS)
def test_a_name_is_read_back_as_its_lambda(one: float, other: float) -> None:
    assert float(lambda_text(one)) == one
    assert (lambda_text(one) == lambda_text(other)) == (one == other) or one == other == 0


def test_limit_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "set.json", [{"instruction": f"do {number}"} for number in range(30)])
    rows = json.loads(
        build(f"alpaca:{path}", limit=6)(ToyEngine(tokenizer=Chatting())).files[
            "model_outputs.json"
        ]
    )
    numbers = [int(row["instruction"].split()[1]) for row in rows]
    assert numbers == sorted(numbers) and len(numbers) == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (
            ROWS + [{"prompt": "x"}],
            r"set\.json: row 3: found the fields \['prompt'\], expected `instruction`",
        ),
        (ROWS + [{"instruction": 5}], r"set\.json: row 3: `instruction` is 5, expected a text"),
        (ROWS + [{"instruction": "x", "dataset": None}], r"set\.json: row 3: `dataset` is None"),
        (
            ROWS + [{"instruction": "x", "id": "7"}],
            r"set\.json: row 3: id `7` was already used at .*row 2",
        ),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(EvaluatorError, match=message) as caught:
        build(f"alpaca:{write(tmp_path / 'set.json', rows)}")
    assert caught.value.hint

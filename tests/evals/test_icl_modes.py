"""In-context learning beyond cloze: letters, and answers in the model's own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pa_fast.errors import EvaluatorError
from pa_fast.evals import build
from tests.evals.test_icl import asked, write
from tests.evals.toy import Characters, ToyEngine

SKY = {"question": "Sky?", "choices": ["red", "blue"], "answer": "blue"}
GRASS = {"question": "Grass?", "choices": ["green", "blue"], "answer": 0, "split": "pool"}


def test_raw_accuracy_stands_beside_the_one_per_character(tmp_path: Path) -> None:
    # the last character is dear: the short answer wins raw, the long one per character
    long, short = {"choices": ["aaaz", "z"], "answer": 0}, {"choices": ["az", "z"], "answer": 1}
    rows = [{"prompt": "x", **row} for row in (long, long, short)]
    engine = ToyEngine(lambda context, token: -3.0 if token == ord("z") else -2.9)
    score = build(f"icl:{write(tmp_path / 'a.jsonl', rows)},shots=0")(engine)
    assert (score.value, score.details) == (2 / 3, {"accuracy_raw": 1 / 3, "ties": 0})
    assert [item.score for item in score.items] == [
        1.0,
        1.0,
        0.0,
    ], "raw it is the last item that is right"
    assert (
        "accuracy_raw" not in build(f"icl:{tmp_path / 'a.jsonl'},shots=0,norm=none")(engine).details
    )


def test_letters_in_the_shots_and_in_the_question(tmp_path: Path) -> None:
    evaluator = build(f"icl:{write(tmp_path / 'a.jsonl', [SKY, GRASS])},shots=1,mode=letter")
    context = (
        "Question: Grass?\nA. green\nB. blue\nAnswer: A\n\nQuestion: Sky?\nA. red\nB. blue\nAnswer:"
    )
    assert asked(evaluator) == [(context, " A"), (context, " B")]
    for liked, right in (("B", 1.0), ("A", 0.0)):
        score = evaluator(ToyEngine(lambda _, token, liked=liked: float(chr(token) == liked)))  # type: ignore[misc]
        assert (score.value, score.unit, score.details) == (right, "accuracy (letter)", {"ties": 0})


def test_letters_after_a_verbatim_prompt(tmp_path: Path) -> None:
    row = {"prompt": "2+2= \n", "choices": ["4", "22"], "answer": "4"}
    evaluator = build(f"icl:{write(tmp_path / 'a.jsonl', [row])},shots=0,mode=letter")
    assert asked(evaluator) == [("2+2=\nA. 4\nB. 22\nAnswer:", answer) for answer in (" A", " B")]


def test_twenty_six_letters_are_enough_for_twenty_six(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(27)]
    path = write(tmp_path / "a.jsonl", [{"question": "?", "choices": texts[:26], "answer": 25}])
    assert asked(build(f"icl:{path},shots=0,mode=letter"))[-1][1] == " Z"
    write(path, [{"question": "?", "choices": texts, "answer": 25}])
    with pytest.raises(EvaluatorError, match=r"a\.jsonl:1: 27 choices for 26 letters"):
        build(f"icl:{path},shots=0,mode=letter")


def test_a_question_is_no_shot_for_itself_whatever_its_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [SKY])
    pool = write(tmp_path / "more.jsonl", [{**SKY, "choices": ["blue", "red"]}])
    with pytest.raises(EvaluatorError, match="the pool has 0 examples"):
        build(f"icl:{path},shots=1,mode=letter,pool={pool}")


@pytest.mark.parametrize(
    ("mode", "row", "message"),
    [
        ("letter", {"question": "?", "answer": "a"}, ":1: found no choices; mode=letter"),
        (
            "letter",
            {"question": "?", "choices": ["a", "a", "b"], "answer": "a"},
            ":1: a choice is listed under two letters",
        ),
        ("generate", {"question": "?", "answer": []}, r":1: answer \[\] is not a text, nor a list"),
        (
            "generate",
            {"question": "?", "answer": ["a", " "]},
            ":1: answer .* is not a text, nor a list",
        ),
        ("generate", {"question": "?", "answer": 4}, ":1: answer 4 is not a text"),
        ("generate", {"question": "?"}, ":1: found the fields .*, expected `answer`"),
    ],
)
def test_rows_that_a_mode_cannot_ask(
    tmp_path: Path, mode: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluatorError, match=message) as caught:
        build(f"icl:{write(tmp_path / 'a.jsonl', [row])},shots=0,mode={mode}")
    assert caught.value.hint


FACTS: list[dict[str, Any]] = [
    {"question": "Capital of France?", "answer": "Paris", "id": "fr"},
    {"question": "2+2?", "answer": ["4", "four"], "id": "sum"},
    {"question": "Sky?", "choices": ["red", "blue"], "answer": 1, "id": "sky"},
]


def said(prompt: str) -> str:
    question = prompt.rpartition("Question: ")[2]
    return {"C": " paris.\n\nQuestion: Sky?", "2": " Four", "S": " ever so blue"}[question[0]]


def test_answers_in_the_models_own_words(tmp_path: Path) -> None:
    evaluator = build(
        f"icl:{write(tmp_path / 'a.jsonl', FACTS)},shots=0,mode=generate,max_new_tokens=9"
    )
    engine = ToyEngine(says=said)
    score = evaluator(engine)
    assert (score.unit, [item.score for item in score.items]) == ("exact match", [1.0, 1.0, 0.0])
    assert engine.configs[0].max_new_tokens == 9
    assert score.details == {
        "truncated": pytest.approx(1 / 3),
        "mean_output_tokens": pytest.approx((7 + 5 + 9) / 3),
    }
    kept = [json.loads(line) for line in score.files["outputs.jsonl"].splitlines()]
    assert [row["output"] for row in kept] == [" paris.", " Four", " ever so "]
    assert [row["truncated"] for row in kept] == [False, False, True]
    assert kept[0] == {
        "id": "fr",
        "group": "a",
        "prompt": "Question: Capital of France?\nAnswer:",
        "output": " paris.",
        "truncated": False,
        "score": 1.0,
    }


def test_several_right_answers_show_the_first(tmp_path: Path) -> None:
    rows = [FACTS[0], {**FACTS[1], "split": "pool"}]
    evaluator = build(f"icl:{write(tmp_path / 'a.jsonl', rows)},shots=1,mode=generate")
    engine = ToyEngine(tokenizer=Characters(bos=False), says=said)
    evaluator(engine)
    assert (
        engine.tokenizer.decode(engine.prompted[0][0])
        == "Question: 2+2?\nAnswer: 4\n\nQuestion: Capital of France?\nAnswer:"
    )


def test_until(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", FACTS[:1])
    score = build(f"icl:{path},shots=0,mode=generate,until=\\n\\n")(
        ToyEngine(says=lambda _: "Pa\nris\n\nQ")
    )
    assert json.loads(score.files["outputs.jsonl"])["output"] == "Pa\nris"
    assert score.details["truncated"] == 0
    cut = build(f"icl:{path},shots=0,mode=generate,until=END,max_new_tokens=8")(
        ToyEngine(says=lambda _: "ParisENDand on")
    )
    assert cut.value == 1 and cut.details == {
        "truncated": 0,
        "mean_output_tokens": 8,
    }, "it had ended by then"


def test_a_line_break_that_is_a_token_ends_generation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", FACTS[:1])
    evaluator = build(f"icl:{path},shots=0,mode=generate,max_new_tokens=50")
    engine = ToyEngine(tokenizer=Characters(merges=["\n\n"]), says=said, stop_tokens=(7, 8))
    score = evaluator(engine)
    assert engine.configs[0].stop == (7, 8, ord("\n"), 0x110000)
    assert score.details["mean_output_tokens"] == len(" paris.")


def test_encoded_once_for_all_lambdas(tmp_path: Path) -> None:
    evaluator = build(f"icl:{write(tmp_path / 'a.jsonl', FACTS)},shots=1,mode=generate")
    engine = ToyEngine(says=said)
    first = evaluator(engine)
    calls = engine.tokenizer.calls
    assert evaluator(engine) == first
    assert engine.tokenizer.calls == calls
    assert engine.prompted[0] is engine.prompted[1]


def test_identity_follows_the_mode_and_its_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [SKY])
    options = [
        "",
        ",mode=letter",
        ",mode=generate",
        ",mode=generate,until=.",
        ",mode=generate,max_new_tokens=5",
    ]
    found = [build(f"icl:{path},shots=0{more}").identity for more in options]
    json.dumps(found)
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(options)
    assert found[0] == build(f"icl:{path},shots=0,mode=cloze").identity

"""In-context learning: what is asked, what counts as right, and which rows are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.base import Evaluator
from pa_fast.errors import EvaluatorError
from pa_fast.evals import build
from tests.evals.toy import Characters, ToyEngine, by_position

ROW = {"prompt": "2+2=", "choices": ["4", "22", "5"], "answer": "4"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(evaluator: Evaluator) -> list[tuple[str, str]]:
    """The texts that the evaluator has scored, context and answer."""
    engine = ToyEngine(tokenizer=Characters(bos=False))
    evaluator(engine)
    [pairs] = engine.asked
    return [
        (engine.tokenizer.decode(context), engine.tokenizer.decode(answer))
        for context, answer in pairs
    ]


def grouped(count: int, groups: str = "ab") -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{group}{number}>",
            "group": group,
            "choices": [f"{group}yes{number}", "no"],
            "answer": 0,
        }
        for number in range(count)
        for group in groups
    ]


def test_shots_and_item_in_the_files_own_words(tmp_path: Path) -> None:
    pool = [{"prompt": "1+1=", "answer": "2", "split": "pool"}]
    path = write(tmp_path / "sums.jsonl", [ROW, *pool])
    assert asked(build(f"icl:{path},shots=1,sep=\\n")) == [
        ("1+1=2\n2+2=", choice) for choice in ("4", "22", "5")
    ]
    assert asked(build(f"icl:{path},shots=1,sep=\\\\\\t")) == [
        ("1+1=2\\\t2+2=", choice) for choice in ("4", "22", "5")
    ]
    assert asked(build(f"icl:{path},shots=0"))[0] == ("2+2=", "4")


@pytest.mark.parametrize(
    "names",
    [
        ("question", "choices", "answer"),
        ("input", "options", "gold"),
        ("query", "endings", "label"),
    ],
)
def test_question_form(tmp_path: Path, names: tuple[str, str, str]) -> None:
    question, choices, answer = names
    rows = [
        {question: "Sky?", choices: ["blue", "red"], answer: 0},
        {question: "Grass?", choices: ["blue", "green"], answer: 1, "split": "pool"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    context = "Question: Grass?\nAnswer: green\n\nQuestion: Sky?\nAnswer:"
    assert asked(build(f"icl:{path},shots=1")) == [(context, " blue"), (context, " red")]


def reference(choices: list[str], values: list[float], right: str, per_character: bool) -> float:
    best, choice = -math.inf, ""
    for value, text in zip(values, choices):
        weighed = value / len(text) if per_character else value
        if weighed > best:
            best, choice = weighed, text
    return float(choice == right)


@given(
    st.lists(
        st.tuples(
            st.text("abcdef", min_size=1, max_size=6),
            st.lists(st.text("abcdef", min_size=1, max_size=9), min_size=2, max_size=4).filter(
                lambda texts: len(set(texts)) > 1
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_accuracy_against_the_reference(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], per_character: bool
) -> None:
    rows = [
        {"prompt": prompt, "choices": choices, "answer": len(choices) - 1}
        for prompt, choices in items
    ]
    path = write(tmp_path_factory.mktemp("icl") / "a.jsonl", rows)
    score = build(f"icl:{path},shots=0" + ("" if per_character else ",norm=none"))(ToyEngine())
    expected = []
    for prompt, choices in items:
        values = []
        for choice in choices:
            ids = [1, *map(ord, prompt + choice)]
            values.append(
                sum(by_position(ids[:t], ids[t]) for t in range(1 + len(prompt), len(ids)))
            )
        expected.append(reference(choices, values, choices[-1], per_character))
    assert [item.score for item in score.items] == expected
    assert score.value == pytest.approx(sum(expected) / len(expected))
    assert score.n == len(items)


def test_length_decides_between_the_two_scores(tmp_path: Path) -> None:
    # every character costs the same but the last one, which costs more: short answers win raw, long
    # ones per character
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "choices": ["aaaz", "z"], "answer": 0}])
    engine = ToyEngine(lambda context, token: -3.0 if token == ord("z") else -0.5)
    score = build(f"icl:{path},shots=0")(engine)
    assert (score.value, score.unit) == (1.0, "accuracy (per character)")
    raw = build(f"icl:{path},shots=0,norm=none")(engine)
    assert (raw.value, raw.unit) == (0.0, "accuracy")


def test_the_space_before_an_answer_is_not_counted_in_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "x", "choices": ["aa", "b"], "answer": 0}])
    nats = {" ": -1.0, "a": -1.0, "b": -0.9}
    # " aa" is −3 over 2 characters, " b" −1.9 over 1; counting the space it would be −1.0 against
    # −0.95
    assert (
        build(f"icl:{path},shots=0")(ToyEngine(lambda context, token: nats[chr(token)])).value
        == 1.0
    )


def test_shots_are_the_items_own_and_of_its_group(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", grouped(20))
    first, again, other = (build(f"icl:{path},shots=3,sep=;", seed=seed) for seed in (0, 0, 1))
    assert asked(first) == asked(first) == asked(again) != asked(other)
    scored = {context.rpartition(";")[2] for context, _ in asked(first)}
    shown = {
        shot.partition(">")[0] + ">"
        for context, _ in asked(first)
        for shot in context.split(";")[:-1]
    }
    assert not scored & shown, "a shot was scored"
    assert len(scored) + len(shown) <= 40
    for context, _ in asked(first):
        *shots, item = context.split(";")
        assert len(set(shots)) == 3
        assert {shot[0] for shot in shots} == {item[0]}


def test_shots_do_not_change_when_items_are_added_or_limited(tmp_path: Path) -> None:
    pool = [{**row, "split": "pool", "prompt": "pool " + row["prompt"]} for row in grouped(9)]
    named = [{**row, "id": row["prompt"]} for row in grouped(12)]
    long = dict(asked(build(f"icl:{write(tmp_path / 'b.jsonl', named + pool)}")))
    short = dict(asked(build(f"icl:{write(tmp_path / 'a.jsonl', named[:6] + pool)}")))
    limited = dict(asked(build(f"icl:{tmp_path / 'b.jsonl'}", limit=4)))
    assert short.items() <= long.items()
    assert limited.items() <= long.items()
    assert len(limited) == 4


def test_the_seed_draws_the_shots(tmp_path: Path) -> None:
    pool = [{**row, "split": "pool", "prompt": "pool " + row["prompt"]} for row in grouped(9)]
    path = write(tmp_path / "a.jsonl", grouped(3) + pool)
    first, again, other = (asked(build(f"icl:{path}", seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [answer for _, answer in first] == [answer for _, answer in other], (
        "the items are the same, only their shots differ"
    )


def test_a_pool_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROW])
    pool = write(tmp_path / "more.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    evaluator = build(f"icl:{path},shots=1,sep=;,pool={pool}")
    assert asked(evaluator)[0] == ("1+1=2;2+2=", "4")
    assert evaluator.name == "icl:a,shots=1,sep=;,pool=more"
    write(pool, [{"prompt": "1+1=", "answer": "2", "group": "sums"}])
    with pytest.raises(EvaluatorError, match=r"a\.jsonl:1: the pool has 0 examples of group `a`"):
        build(f"icl:{path},shots=1,pool={pool}")
    write(path, [ROW, {**ROW, "split": "pool"}])
    with pytest.raises(EvaluatorError, match="marked as pool, and pool="):
        build(f"icl:{path},shots=1,pool={pool}")


def test_an_item_is_never_its_own_shot(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROW])
    pool = write(
        tmp_path / "more.jsonl",
        [{"prompt": "1+1=", "answer": "2"}, {"prompt": ROW["prompt"], "answer": "4"}],
    )
    assert asked(build(f"icl:{path},shots=1,sep=;,pool={pool}"))[0] == ("1+1=2;2+2=", "4")
    with pytest.raises(
        EvaluatorError, match="the pool has 1 examples of group `a`, expected at least shots=2"
    ):
        build(f"icl:{path},shots=2,pool={pool}")


def test_items_are_named_and_grouped(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": 7, "group": "sums"}]
    score = build(f"icl:{write(tmp_path / 'a.jsonl', rows)},shots=0")(ToyEngine())
    assert [(item.id, item.group) for item in score.items] == [("1", "a"), ("7", "sums")]


def test_prompts_are_encoded_once_for_all_lambdas(tmp_path: Path) -> None:
    evaluator = build(f"icl:{write(tmp_path / 'a.jsonl', grouped(12))},shots=2")
    engine = ToyEngine()
    first = evaluator(engine)
    calls = engine.tokenizer.calls
    assert evaluator(engine) == first
    assert engine.tokenizer.calls == calls
    assert len(engine.asked) == 2, "one call of the engine at each λ"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"choices": ["a"], "answer": 0},
            r":1: found the fields .*expected `prompt` or `question`",
        ),
        ({"prompt": "x", "choices": ["a", "b"]}, r":1: found the fields .*expected `answer`"),
        ({"prompt": "x", "answer": "a"}, r":1: found no choices"),
        (
            {"prompt": "x", "choices": ["a", "b"], "answer": "c"},
            r":1: answer 'c' is not among the choices",
        ),
        (
            {"prompt": "x", "choices": ["a", "b"], "answer": 2},
            r":1: answer 2 is not among the choices",
        ),
        (
            {"prompt": "x", "choices": ["a", "b"], "answer": -1},
            r":1: answer -1 is not among the choices",
        ),
        (
            {"prompt": "x", "choices": ["a", "b"], "answer": True},
            r":1: answer True is not among the choices",
        ),
        (
            {"prompt": "x", "choices": ["a", "b"], "answer": None},
            r":1: answer None is not among the choices",
        ),
        (
            {"prompt": "x", "choices": [], "answer": 0},
            r":1: `choices` is \[\], expected a list of texts",
        ),
        (
            {"prompt": "x", "choices": [1, 2], "answer": 0},
            r":1: `choices` is \[1, 2\], expected a list of texts",
        ),
        (
            {"prompt": "x", "choices": ["", "b"], "answer": 1},
            r":1: `choices` is .*expected a list of texts",
        ),
        ({"prompt": 5, "choices": ["a", "b"], "answer": 0}, r":1: `prompt` is 5, expected a text"),
        (
            {"question": " ", "choices": ["a", "b"], "answer": 0},
            r":1: `question` is ' ', expected a text",
        ),
        ({**ROW, "split": "pool"}, "all 1 rows are in the pool"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(EvaluatorError, match=message) as caught:
        build(f"icl:{path},shots=0")
    assert caught.value.hint
    assert "bad.jsonl" in caught.value.message


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**ROW, "id": "2"}, ROW])
    with pytest.raises(EvaluatorError, match=r":2: id `2` was already used at .*:1"):
        build(f"icl:{path},shots=0")


def test_a_group_too_small_to_divide(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", grouped(20, "a") + grouped(3, "b"))
    with pytest.raises(EvaluatorError, match="group `b` has 3 rows, expected more than 3"):
        build(f"icl:{path},shots=3")
    assert build(f"icl:{path},shots=2")(ToyEngine()).n == 16 + 1


def test_identity_follows_data_pool_and_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROW])
    pool = write(tmp_path / "more.jsonl", [{"prompt": "1+1=", "answer": "2"}])

    def of(options: str, seed: int = 0) -> Any:
        return build(f"icl:{path},{options}", seed=seed).identity

    first = of(f"shots=1,pool={pool}")
    json.dumps(first)
    assert first == of(f"pool={pool},shots=1,sep=\\n\\n")
    others = [
        of(f"shots=1,pool={pool}", 1),
        of(f"shots=0,pool={pool}"),
        of(f"shots=1,pool={pool},norm=none"),
    ]
    write(pool, [{"prompt": "1+1=", "answer": "3"}])
    others.append(of(f"shots=1,pool={pool}"))
    assert first not in others


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("icl") / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluatorError):
        build(f"icl:{path},shots=0")


FIELDS = st.sampled_from(
    ["prompt", "question", "input", "choices", "options", "answer", "label", "id", "group", "split"]
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.sampled_from(["a", "b", "", "pool"])
    | st.lists(st.sampled_from(["a", "b"]))
)


@given(st.lists(st.dictionaries(FIELDS, VALUES, max_size=6), min_size=1, max_size=5))
def test_any_rows_are_scored_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = write(tmp_path_factory.mktemp("icl") / "a.jsonl", rows)
    try:
        evaluator = build(f"icl:{path},shots=0")
    except EvaluatorError as error:
        assert error.hint
        return
    assert 0 <= evaluator(ToyEngine()).value <= 1


@pytest.mark.parametrize("mode", ["cloze", "letter", "generate"])
def test_rows_that_are_held_out_for_shots_are_told(tmp_path: Path, mode: str) -> None:
    rows, engine = grouped(10), ToyEngine()
    path = write(tmp_path / "a.jsonl", rows)

    def said(options: str) -> list[str]:
        return list(build(f"icl:{path},mode={mode},{options}").check(engine))  # type: ignore[attr-defined]

    held = f"of {len(rows)} rows are held out for shots (drawn from each group) and not scored"
    assert said("shots=1") == [f"{2 * max(1, len(rows) // 2 // 5)} {held}"]
    assert said("shots=0") == []
    pool = write(tmp_path / "more.jsonl", rows[:1])
    assert said(f"shots=0,pool={pool}") == []
    write(path, [{**row, "split": "pool"} if n < 3 else row for n, row in enumerate(rows)])
    assert said("shots=0") == [
        f"3 of {len(rows)} rows are held out for shots (marked as pool) and not scored"
    ]

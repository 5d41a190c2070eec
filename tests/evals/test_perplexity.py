"""Perplexity against a token-by-token reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import build
from pa_fast.evals.perplexity import windows
from tests.evals.toy import Characters, ToyEngine, by_position


@given(st.lists(st.integers(3, 99), max_size=60), st.booleans(), st.integers(2, 12), st.data())
def test_windows_score_each_token_once_with_the_longest_context(
    ids: list[int], has_bos: bool, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    whole = [1, *ids] if has_bos else ids
    at = 1
    for index, (context, continuation) in enumerate(
        windows(ids, 1 if has_bos else None, window, stride)
    ):
        assert continuation == whole[at : at + len(continuation)]
        assert context == whole[:at][-len(context) :], "the context is what stands before"
        assert len(context) + len(continuation) <= window
        assert len(context) == min(at, window - len(continuation)), "there was room for more"
        assert index == 0 or len(continuation) <= stride
        at += len(continuation)
    assert at == max(1, len(whole)), "tokens were left out"


def reference(texts: list[str], window: int, stride: int, bos: bool) -> tuple[float, list[float]]:
    """Token t of a text is scored in the first window that reaches it."""
    every: list[float] = []
    means = []
    for text in texts:
        whole = [1] * bos + [ord(character) for character in text]
        nats = []
        for t in range(1, len(whole)):
            end = window
            while end <= t:
                end += stride
            begin = max(0, min(end, len(whole)) - window)
            nats.append(-by_position(whole[begin:t], whole[t]))
        every += nats
        means.append(sum(nats) / len(nats))
    return math.exp(sum(every) / len(every)), means


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (5, 1), (6, 5), (512, 256)])
def test_value_and_items(tmp_path: Path, window: int, stride: int, bos: bool) -> None:
    texts = ["It was a dark and stormy night.", "ab", "x" * 17 + "y"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    evaluator = build(f"perplexity:{path},window={window},stride={stride}")
    engine = ToyEngine(tokenizer=Characters(bos))
    score = evaluator(engine)
    value, means = reference(texts, window, stride, bos)
    assert score.value == pytest.approx(value, rel=1e-12)
    assert [item.score for item in score.items] == pytest.approx(means, rel=1e-12)
    assert [item.id for item in score.items] == ["1", "2", "3"]
    assert (score.unit, score.n, evaluator.higher_is_better) == (
        f"perplexity, window {window}",
        3,
        False,
    )
    assert len(engine.asked) == 1, "all windows in one call"


def test_uniform_model_has_the_perplexity_of_its_alphabet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text of no import")
    score = build(f"perplexity:{tmp_path / 'a.txt'}")(
        ToyEngine(lambda context, token: -math.log(26))
    )
    assert score.value == pytest.approx(26)


def test_whole_file_or_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n \n\n\nthree\n\n")
    assert build(f"perplexity:{path}")(ToyEngine()).n == 1
    engine = ToyEngine()
    assert build(f"perplexity:{path},split=blank")(engine).n == 2
    assert [engine.tokenizer.decode(continuation) for _, continuation in engine.asked[0]] == [
        "one\ntwo",
        "three",
    ]


def test_limit_keeps_the_same_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"document {number}" for number in range(30)))
    ids = [
        [
            item.id
            for item in build(f"perplexity:{path},split=blank", limit=5, seed=seed)(
                ToyEngine()
            ).items
        ]
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0] == sorted(ids[0], key=int)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"text": "ab"}\n{"txt": "ab"}', r":2: found no text"),
        ('{"text": ""}', r":1: found no text"),
        ('{"text": "ab"}\n{"text": ', r":2: not JSON"),
        ('"ab"', r":1: found a JSON str, expected an object"),
        ("[" * 100_000, r":1: not JSON"),
    ],
)
def test_bad_rows(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(EvaluatorError, match=message) as caught:
        build(f"perplexity:{path}")
    assert caught.value.hint


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluatorError, match="not UTF-8"):
        build(f"perplexity:{tmp_path / 'a.txt'}")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(EvaluatorError, match="is empty"):
        build(f"perplexity:{tmp_path / 'b.txt'}")
    (tmp_path / "c.jsonl").write_text('{"text": "ab"}')
    with pytest.raises(UsageError, match="split=blank is for text files"):
        build(f"perplexity:{tmp_path / 'c.jsonl'},split=blank")


def test_a_document_without_a_scorable_token_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab\n\nc")
    evaluator = build(f"perplexity:{tmp_path / 'a.txt'},split=blank")
    assert evaluator(ToyEngine()).n == 2
    with pytest.raises(EvaluatorError, match="document 1 is too short"):
        evaluator(ToyEngine(tokenizer=Characters(bos=False)))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_model_that_overflows_is_not_a_score(tmp_path: Path, bad: float) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(EvaluatorError, match="document 0: log-likelihood is"):
        build(f"perplexity:{tmp_path / 'a.txt'}")(ToyEngine(lambda context, token: bad))
    with pytest.raises(EvaluatorError, match="is not a number"):
        build(f"perplexity:{tmp_path / 'a.txt'}")(ToyEngine(lambda context, token: -1e6))


def test_identity_follows_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    first = build(f"perplexity:{path}").identity
    assert first == build(f"perplexity:{path}").identity
    json.dumps(first)
    assert first != build(f"perplexity:{path},window=64").identity
    path.write_text("abd")
    assert first != build(f"perplexity:{path}").identity


def test_a_document_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    scores = []
    for text in ("\x01abc", "abc"):
        (tmp_path / "a.txt").write_text(text)
        engine = ToyEngine()
        scores.append(build(f"perplexity:{tmp_path / 'a.txt'}")(engine).value)
        assert engine.asked == [[([1], [97, 98, 99])]]
    assert scores[0] == scores[1]

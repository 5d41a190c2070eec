"""Where a context ends and its answer begins."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pa_fast.errors import EvaluatorError
from pa_fast.evals.scores import Encoder, Prepared, logprobs, pairs_of
from tests.evals.styles import STYLES, tokenizer_of
from tests.evals.toy import Characters, ToyEngine


def texts(tokenizer: Characters, context: str, answer: str) -> tuple[str, str]:
    [(before, after)] = pairs_of(tokenizer, context, [answer])
    return tokenizer.decode(before), tokenizer.decode(after)


def test_the_answer_is_what_follows() -> None:
    assert texts(Characters(), "Q: a\nAnswer:", " b") == ("\x01Q: a\nAnswer:", " b")
    assert texts(Characters(bos=False), "abc>", "cba") == ("abc>", "cba")


def test_trailing_spaces_belong_to_the_answer() -> None:
    assert texts(Characters(), "Answer: ", "b") == ("\x01Answer:", " b")
    assert texts(Characters(merges=[" b"]), "Answer: ", "b") == ("\x01Answer:", " b")
    assert pairs_of(Characters(merges=[" b"]), "Answer: ", ["b"])[0][1] == [0x110000]


def test_a_token_across_the_boundary_is_scored_whole() -> None:
    # alone the context is x, a; the whole is x, ab, c
    tokenizer = Characters(bos=False, merges=["ab"])
    assert texts(tokenizer, "xa", "bc") == ("x", "abc")
    assert texts(tokenizer, "xa", "b") == ("x", "ab")


def test_all_answers_of_an_item_are_cut_at_one_place() -> None:
    tokenizer = Characters(bos=False, merges=["(A"])
    pairs = pairs_of(tokenizer, "x(", ["A)", "B)", "C)"])
    assert [tokenizer.decode(before) for before, _ in pairs] == ["x", "x", "x"]
    assert [tokenizer.decode(after) for _, after in pairs] == ["(A)", "(B)", "(C)"]


@pytest.mark.parametrize(("context", "answer"), [("", "b"), ("  ", "b"), ("a", "b"), ("x", "")])
def test_nothing_to_score_is_refused(context: str, answer: str) -> None:
    with pytest.raises(EvaluatorError, match="at least one of each"):
        pairs_of(Characters(bos=False, merges=["ab"]), context, [answer])


def test_llama_3_splits_a_bracket_from_its_letter_only_where_it_knows_no_such_token() -> None:
    tokenizer = tokenizer_of("byte-level")
    context = "The answer is one of\n("
    wholes = [
        tokenizer.convert_ids_to_tokens(tokenizer.encode(context + answer))[-2:]
        for answer in ("A)", "D)")
    ]
    assert wholes == [
        ["(A", ")"],
        ["D", ")"],
    ], "one token lies across the boundary, the other does not"
    pairs = pairs_of(tokenizer, context, ["A)", "B)", "D)"])
    assert [tokenizer.decode(after) for _, after in pairs] == ["(A)", "(B)", "(D)"]


PIECES = st.sampled_from(
    [
        "The answer is ",
        "(",
        "(A",
        ")",
        "A",
        "B",
        "un",
        "able",
        "play",
        "ing",
        " ",
        "\n",
        ":",
        "12",
        "2+",
        "β",
        "γ",
        "zq",
        "é",
    ]
)
PHRASES = st.lists(PIECES, min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize("style", STYLES)
@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the input
@given(context=PHRASES, answers=st.lists(PHRASES.filter(str.strip), min_size=1, max_size=4))
def test_no_answer_is_scored_on_a_part_in_any_style_of_tokenizer(
    style: str, context: str, answers: list[str]
) -> None:
    tokenizer = tokenizer_of(style)
    end = len(context.rstrip())
    try:
        pairs = pairs_of(tokenizer, context, answers)
    except EvaluatorError:
        pytest.fail("there is BOS before every context, and text in every answer")
    size = len(pairs[0][0])
    assert all(len(before) == size for before, _ in pairs), "one boundary for all"
    agree, spans = [], []
    alone = [tokenizer.bos_token_id, *tokenizer.encode(context.rstrip(), add_special_tokens=False)]
    for answer, (before, after) in zip(answers, pairs):
        found = tokenizer(context + answer, add_special_tokens=False, return_offsets_mapping=True)
        assert before + after == [
            tokenizer.bos_token_id,
            *found["input_ids"],
        ], "BOS once, and nothing after the text"
        starts_and_ends = [(0, 0), *found["offset_mapping"]]
        assert all(stop <= end for _, stop in starts_and_ends[:size]), (
            "a part of the answer stands in the context"
        )
        agree.append((before + after)[: size + 1] == alone[: size + 1])
        spans.append(starts_and_ends[size][1])
    assert not all(agree) or len(alone) <= size or max(spans) > end, (
        "a longer context would have been shared by all"
    )


@given(st.text("ab \n>", min_size=1), st.text("ab \n>", min_size=1), st.booleans())
def test_both_parts_are_the_whole(context: str, answer: str, bos: bool) -> None:
    tokenizer = Characters(bos, merges=["ab", "> ", "ba"])
    try:
        [(before, after)] = pairs_of(tokenizer, context, [answer])
    except EvaluatorError:
        return
    assert before + after == tokenizer.encode(context + answer)


def test_an_engine_that_drops_an_answer_is_caught() -> None:
    class Forgetful(ToyEngine):
        def loglikelihood(self, pairs):  # type: ignore[no-untyped-def]
            return super().loglikelihood(pairs)[1:]

    with pytest.raises(EvaluatorError, match="scored 1 continuations, expected 2"):
        logprobs(Forgetful(), [([1], [5]), ([1], [6])], str)


def test_prepared_once_for_a_tokenizer() -> None:
    prepared = Prepared(lambda tokenizer, room: (tokenizer.encode("abc"), room))
    one, other = ToyEngine(), ToyEngine(tokenizer=Characters(bos=False))
    assert prepared(one) is prepared(one)
    assert one.tokenizer.calls == 1
    assert prepared(other)[0] == [97, 98, 99], "another tokenizer, other tokens"
    other.positions = 7  # type: ignore[attr-defined]
    assert prepared(other)[1] == 7, "another model, other positions"


@pytest.mark.parametrize("style", STYLES)
def test_a_text_that_begins_with_bos_does_not_get_a_second_one(style: str) -> None:
    tokenizer = tokenizer_of(style)
    bos = tokenizer.bos_token_id
    encode = Encoder(tokenizer)
    assert encode.prefix == [bos]
    for text in ("Answer: ", tokenizer.bos_token + "Answer: ", tokenizer.bos_token):
        assert encode(text).count(bos) == 1 and encode(text)[0] == bos
    assert tokenizer.sep_token_id not in encode("able"), (
        "what says that a text has ended is left out"
    )
    assert encode.rendered("able") == tokenizer.encode("able", add_special_tokens=False), (
        "a template writes BOS itself"
    )
    assert encode.rendered(tokenizer.bos_token * 2 + "able").count(bos) == 1
    for before, _ in pairs_of(tokenizer, tokenizer.bos_token + "Answer:", [" able", " four"]):
        assert before.count(bos) == 1


def test_a_tokenizer_without_bos_gets_none() -> None:
    assert Encoder(Characters(bos=False))("\x01a") == [1, 97]
    assert Encoder(Characters(bos=False)).prefix == []

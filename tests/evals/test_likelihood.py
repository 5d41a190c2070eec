"""Where a context ends and its answer begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.errors import EvaluatorError
from pa_fast.evals.likelihood import Prepared, logprobs, pairs_of
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


def test_a_token_across_the_boundary_is_cut_where_the_context_ends() -> None:
    # alone the context is x, a; the whole is x, ab, c: the whole is cut after two tokens
    tokenizer = Characters(bos=False, merges=["ab"])
    assert texts(tokenizer, "xa", "bc") == ("xab", "c")


@pytest.mark.parametrize(("context", "answer"), [("", "b"), ("  ", "b"), ("xa", "b"), ("x", "")])
def test_nothing_to_score_is_refused(context: str, answer: str) -> None:
    with pytest.raises(EvaluatorError, match="at least one of each"):
        pairs_of(Characters(bos=False, merges=["ab"]), context, [answer])


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
    prepared = Prepared(lambda tokenizer: tokenizer.encode("abc"))
    one, other = Characters(), Characters(bos=False)
    assert prepared(one) is prepared(one)
    assert one.calls == 1
    assert prepared(other) == [97, 98, 99], "another tokenizer, other tokens"

"""Text to log-likelihoods: where a context ends and its continuation begins, and one checked call
of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from pa_fast.base import Engine, Tokenizer, complete
from pa_fast.errors import EvaluatorError
from pa_fast.evals.encoding import Encoder

Pair = tuple[list[int], list[int]]
T = TypeVar("T")


def pairs_of(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> list[Pair]:
    """Context and continuation ids for each continuation of one context.

    All continuations are cut at one place, a token boundary of every whole text: the longest token
    prefix that the context and all wholes share, after the context's trailing spaces have moved to
    the continuations. So no continuation gives a part of itself away to its context, where a token
    lies across the boundary. BOS as the tokenizer says, once.

    Raises:
        EvaluatorError: a continuation adds no token to its context, or nothing stands before it.
    Source: lm-eval `TemplateLM._encode_pair`; unlike it, which cuts at the context's number of
        tokens, the boundary is one of tokens that agree. Where no token lies across it both give
        the same pairs.
    """
    encode = Encoder(tokenizer)
    stripped = context.rstrip()
    texts = [context + continuation for continuation in continuations]
    wholes = [encode(text) for text in texts]
    size = _shared([encode(stripped), *wholes])
    while (
        size
        and wholes[0][size - 1] == getattr(tokenizer, "unk_token_id", None)
        and _reaches(tokenizer, texts, wholes, size, len(stripped))
    ):
        size -= 1  # one unknown token stands for other characters in the whole than in the context
    for continuation, whole in zip(continuations, wholes):
        if size == 0 or len(whole) <= size:
            raise EvaluatorError(
                f"`{continuation}` after `{stripped[-40:]}` leaves {size} tokens of context and "
                f"{len(whole[size:])} of continuation, expected at least one of each",
                "a prompt may not be empty where the tokenizer has no BOS, and an answer must add"
                " text to it",
            )
    return [(whole[:size], whole[size:]) for whole in wholes]


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of `rows` begin with alike."""
    columns = enumerate(zip(*rows))
    return next((n for n, column in columns if len(set(column)) > 1), min(map(len, rows)))


def _reaches(
    tokenizer: Any, texts: Sequence[str], wholes: Sequence[Sequence[int]], size: int, end: int
) -> bool:
    """Whether the token before place `size` covers a character from `end` on in one of `texts`;
    True where nobody can tell."""
    if not getattr(tokenizer, "is_fast", False):
        return True
    for text, whole in zip(texts, wholes):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        before = len(whole) - len(found["input_ids"])  # what the tokenizer writes before the text
        if size > before and found["offset_mapping"][size - before - 1][1] > end:
            return True
    return False


def logprobs(engine: Engine, pairs: Sequence[Pair], label: Callable[[int], str]) -> list[float]:
    """Log-likelihood in nats of each pair's continuation, in one call of the engine; `label` names
    pair i in errors.

    Raises:
        EvaluatorError: the engine answered with another number of values, or with one that is not
            finite.
    """
    values = [answer.logprob for answer in engine.loglikelihood(pairs)]
    if len(values) != len(pairs):
        raise EvaluatorError(
            f"the engine scored {len(values)} continuations, expected {len(pairs)}"
        )
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise EvaluatorError(
                f"{label(index)}: log-likelihood is {value}, expected a finite number",
                "the model overflows at this λ; move the λ range, or use a wider --dtype",
            )
    return values


class Prepared(Generic[T]):
    """What an evaluator's items are for one tokenizer and number of positions: made before the
    first λ, the same object at every one."""

    def __init__(self, make: Callable[[Tokenizer, int | None], T]):
        self._make = make
        self._made: tuple[Tokenizer, int | None, T] | None = None

    def __call__(self, engine: Engine) -> T:
        tokenizer, room = engine.tokenizer, complete(engine).positions
        if self._made is None or self._made[0] is not tokenizer or self._made[1] != room:
            self._made = (tokenizer, room, self._make(tokenizer, room))
        return self._made[2]

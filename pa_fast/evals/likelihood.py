"""Text to log-likelihoods: where a context ends and its continuation begins, and one checked call of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pa_fast.base import Engine, Tokenizer
from pa_fast.errors import EvaluatorError

Pair = tuple[list[int], list[int]]
T = TypeVar("T")


def pairs_of(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> list[Pair]:
    """Context and continuation ids for each continuation of one context.

    The boundary is a token boundary of the whole text: the whole is encoded, and cut at the number of tokens that the
    context alone has, after its trailing spaces have moved to the continuation. BOS as the tokenizer says.

    Raises:
        EvaluatorError: a continuation adds no token to its context, or nothing stands before it.
    Source: lm-eval `TemplateLM._encode_pair`; unlike it, the context ids are those of the whole text.
    """
    stripped = context.rstrip()
    spaces = context[len(stripped) :]
    size = len(tokenizer.encode(stripped))
    found = []
    for continuation in continuations:
        whole = tokenizer.encode(stripped + spaces + continuation)
        if size == 0 or len(whole) <= size:
            raise EvaluatorError(
                f"`{continuation}` after `{stripped[-40:]}` leaves {len(whole[:size])} tokens of context and "
                f"{len(whole[size:])} of continuation, expected at least one of each",
                "a prompt may not be empty where the tokenizer has no BOS, and an answer must add text to it",
            )
        found.append((whole[:size], whole[size:]))
    return found


def logprobs(engine: Engine, pairs: Sequence[Pair], label: Callable[[int], str]) -> list[float]:
    """Log-likelihood in nats of each pair's continuation, in one call of the engine; `label` names pair i in errors.

    Raises:
        EvaluatorError: the engine answered with another number of values, or with one that is not finite.
    """
    values = [answer.logprob for answer in engine.loglikelihood(pairs)]
    if len(values) != len(pairs):
        raise EvaluatorError(f"the engine scored {len(values)} continuations, expected {len(pairs)}")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise EvaluatorError(
                f"{label(index)}: log-likelihood is {value}, expected a finite number",
                "the model overflows at this λ; move the λ range, or use a wider --dtype",
            )
    return values


class Prepared(Generic[T]):
    """What an evaluator's items are under one tokenizer: made at the first λ, the same object at every other."""

    def __init__(self, make: Callable[[Tokenizer], T]):
        self._make = make
        self._made: tuple[Tokenizer, T] | None = None

    def __call__(self, tokenizer: Tokenizer) -> T:
        if self._made is None or self._made[0] is not tokenizer:
            self._made = (tokenizer, self._make(tokenizer))
        return self._made[1]

"""Parts that evaluators share: averages over groups, outputs as files, requests from texts, and
their likelihoods."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pa_fast.base import Engine, Generation, Item, Tokenizer, complete
from pa_fast.errors import EvaluatorError

AVERAGES = ("macro", "micro")
"""`macro`: the mean over groups of each one's mean. `micro`: the mean over items."""


def averaged(items: Sequence[Item], kind: str) -> float:
    """Return the mean score of `items`, by `kind`."""
    if kind == "micro":
        return sum(item.score for item in items) / len(items)
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item.score)
    return sum(sum(scores) / len(scores) for scores in groups.values()) / len(groups)


def weighted(items: Sequence[Item], kind: str) -> list[Item]:
    """Return `items` with their weights in the average by `kind`: 1 where all are equal."""
    sizes = Counter(item.group for item in items)
    if kind == "micro" or len(set(sizes.values())) == 1:
        return list(items)
    mean = len(items) / len(sizes)
    return [replace(item, weight=mean / sizes[item.group]) for item in items]


def labelled(unit: str, groups: Iterable[str], kind: str) -> str:
    """Return `unit`, with the kind of average where there are several groups."""
    return f"{unit}, {kind}" if len(set(groups)) > 1 else unit


# --- outputs


@dataclass(frozen=True)
class Output:
    """A text that a model wrote, its length in tokens, and whether the limit cut it short."""

    text: str
    tokens: int
    truncated: bool


def generated(
    engine: Engine,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: str | None = None,
    stop_ids: tuple[int, ...] = (),
) -> list[Output]:
    """Return greedy outputs of N prompts, from one call of the engine; they end at a stop token,
    before `until`, or at the limit.

    An engine leaves the stop token out, so an output of `max_new_tokens` tokens without `until` was
    cut by the limit.

    Args:
        stop_ids: `ending_tokens` of `until`.

    Raises:
        EvaluatorError: the engine answered with another number of outputs.
    """
    stops = tuple(complete(engine).stop_tokens)
    spoken = engine.generate(prompts, Generation(max_new_tokens, stops + stop_ids))
    if len(spoken) != len(prompts):
        raise EvaluatorError(f"the engine wrote {len(spoken)} outputs, expected {len(prompts)}")
    outputs = []
    for ids in spoken:
        text = engine.tokenizer.decode(ids)
        cut = -1 if until is None else text.find(until)
        outputs.append(
            Output(
                text if cut < 0 else text[:cut], len(ids), cut < 0 and len(ids) >= max_new_tokens
            )
        )
    return outputs


def ending_tokens(tokenizer: Tokenizer, until: str) -> tuple[int, ...]:
    """Return tokens that are `until`, once or twice, and nothing else: stopping there saves time
    and changes no output."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (until, until * 2)]
    return tuple(
        ids[0] for ids in encoded if len(ids) == 1 and tokenizer.decode(ids).startswith(until)
    )


def figures(outputs: Sequence[Output]) -> dict[str, float]:
    """Return the share of outputs that the limit cut, and their mean length in tokens."""
    return {
        "truncated": sum(output.truncated for output in outputs) / len(outputs),
        "mean_output_tokens": sum(output.tokens for output in outputs) / len(outputs),
    }


def record(item: Item, prompt: str, output: Output) -> dict[str, Any]:
    """Return one output as `outputs.jsonl` keeps it."""
    return {
        "id": item.id,
        "group": item.group,
        "prompt": prompt,
        "output": output.text,
        "truncated": output.truncated,
        "score": item.score,
    }


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return `rows` as the text of a `.jsonl` file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- encoding

_PROBE = "a"


class Encoder:
    """Encodes texts that the model continues.

    `prefix` is what the tokenizer writes before a text, BOS in most cases. A text that begins with
    it, such as a prompt rendered by a chat template, does not get it again. What the tokenizer
    writes after a text, such as EOS or `[SEP]`, is left out: the text goes on.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.prefix = _prefix(tokenizer)

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids if _begins(ids, self.prefix) else self.prefix + ids

    def rendered(self, text: str) -> list[int]:
        """Return the ids of a text that a chat template wrote, with its special tokens. A prefix
        that a message repeats right behind the template's is dropped."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        bos = self._tokenizer.bos_token_id
        prefix = self.prefix or ([] if bos is None else [bos])
        while prefix and _begins(ids, prefix * 2):
            ids = ids[len(prefix) :]
        return ids


def _begins(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return bool(prefix) and list(ids[: len(prefix)]) == list(prefix)


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer writes before any text."""
    alone = tokenizer.encode(_PROBE, add_special_tokens=False)
    dressed = tokenizer.encode(_PROBE)
    for start in range(len(dressed) - len(alone) + 1) if alone else ():
        if dressed[start : start + len(alone)] == alone:
            return dressed[:start]
    # the tokenizer does not know the probe: take BOS if it is first
    return dressed[:1] if dressed and dressed[0] == tokenizer.bos_token_id else []


# --- likelihood

TokenPair = tuple[list[int], list[int]]
T = TypeVar("T")


def pairs_of(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> list[TokenPair]:
    """Return context and continuation ids for each continuation of one context.

    All continuations are cut at the same token boundary: behind the longest token prefix that the
    context and all whole texts share, after the context's trailing spaces have moved to the
    continuations. So no token of a context contains a part of a continuation. BOS as the tokenizer
    has it, once.

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
        size -= 1  # an unknown token may have other characters in the whole than in the context
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
    """Return the length of the common prefix of all `rows`."""
    columns = enumerate(zip(*rows))
    return next((n for n, column in columns if len(set(column)) > 1), min(map(len, rows)))


def _reaches(
    tokenizer: Any, texts: Sequence[str], wholes: Sequence[Sequence[int]], size: int, end: int
) -> bool:
    """Return whether token `size` − 1 covers a character from `end` on in one of `texts`; True
    where the tokenizer gives no offsets."""
    if not getattr(tokenizer, "is_fast", False):
        return True
    for text, whole in zip(texts, wholes):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        before = len(whole) - len(
            encoding["input_ids"]
        )  # what the tokenizer writes before the text
        if size > before and encoding["offset_mapping"][size - before - 1][1] > end:
            return True
    return False


def logprobs(
    engine: Engine, pairs: Sequence[TokenPair], label: Callable[[int], str]
) -> list[float]:
    """Return the log-likelihood in nats of each pair's continuation, from one call of the engine;
    `label` names pair i in errors.

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
    """An evaluator's requests for one tokenizer and number of positions: made before the first λ
    and cached, so the same at every λ."""

    def __init__(self, make: Callable[[Tokenizer, int | None], T]):
        self._make = make
        self._cached: tuple[Tokenizer, int | None, T] | None = None

    def __call__(self, engine: Engine) -> T:
        tokenizer, positions = engine.tokenizer, complete(engine).positions
        if self._cached is None or self._cached[0] is not tokenizer or self._cached[1] != positions:
            self._cached = (tokenizer, positions, self._make(tokenizer, positions))
        return self._cached[2]

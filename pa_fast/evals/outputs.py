"""Outputs: what a model writes after its prompts, and the files that keep it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pa_fast.base import Engine, Generation, Item, Tokenizer, complete
from pa_fast.errors import EvaluatorError


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
    ends: tuple[int, ...] = (),
) -> list[Output]:
    """Greedy outputs of N prompts, in one call of the engine; they end at a stop token, before
    `until`, or at the limit.

    An engine leaves the stop token out, so an output of `max_new_tokens` tokens without `until` was
    cut by the limit.

    Args:
        ends: `ending_tokens` of `until`.

    Raises:
        EvaluatorError: the engine answered with another number of outputs.
    """
    stops = tuple(complete(engine).stop_tokens)
    spoken = engine.generate(prompts, Generation(max_new_tokens, stops + ends))
    if len(spoken) != len(prompts):
        raise EvaluatorError(f"the engine wrote {len(spoken)} outputs, expected {len(prompts)}")
    found = []
    for ids in spoken:
        text = engine.tokenizer.decode(ids)
        cut = -1 if until is None else text.find(until)
        found.append(
            Output(
                text if cut < 0 else text[:cut], len(ids), cut < 0 and len(ids) >= max_new_tokens
            )
        )
    return found


def ending_tokens(tokenizer: Tokenizer, until: str) -> tuple[int, ...]:
    """Tokens that are `until`, once or twice, and nothing else: to stop there costs less and
    changes no output."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (until, until * 2)]
    return tuple(
        ids[0] for ids in encoded if len(ids) == 1 and tokenizer.decode(ids).startswith(until)
    )


def figures(outputs: Sequence[Output]) -> dict[str, float]:
    """What every table of outputs should be read with: the share that the limit cut, and the mean
    length."""
    return {
        "truncated": sum(output.truncated for output in outputs) / len(outputs),
        "mean_output_tokens": sum(output.tokens for output in outputs) / len(outputs),
    }


def record(item: Item, prompt: str, output: Output) -> dict[str, Any]:
    """One output as `outputs.jsonl` keeps it."""
    return {
        "id": item.id,
        "group": item.group,
        "prompt": prompt,
        "output": output.text,
        "truncated": output.truncated,
        "score": item.score,
    }


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """`rows` as the text of a `.jsonl` file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

"""In-context learning: labelled examples, each asked after k others of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, Tokenizer
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.examples import Example
from pa_fast.evals.files import read_file
from pa_fast.evals.kind import EvalSpec, Kind
from pa_fast.evals.likelihood import Pair, Prepared, logprobs, pairs_of
from pa_fast.evals.matching import matches
from pa_fast.evals.outputs import ending_tokens, figures, generated, json_lines, record
from pa_fast.evals.prompts import Prompt, encoded
from pa_fast.evals.shots import Shots


class Choice:
    """Accuracy by likelihood: the likeliest choice is the model's answer, the first of equally likely ones.

    Modes: `cloze` scores the text of each choice, `letter` the letter under which the prompt lists it.

    Args:
        items, prompts: the examples, and what stands before each choice.
        per_character: divide each log-likelihood by the length of the choice's text, as lm-eval's `acc_norm`; else
            it is taken as it is, as `acc`.

    Raises:
        EvaluatorError: an item has no choices.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        items: Sequence[Example],
        prompts: Sequence[str],
        *,
        unit: str,
        per_character: bool,
        identity: Mapping[str, Any],
    ):
        for item in items:
            if not item.choices:
                raise EvaluatorError(f"{item.where}: found no choices; mode=cloze scores choices", "give the row `choices`")
        self.name = name
        self.items, self.prompts = items, prompts
        self.unit, self.per_character = unit, per_character
        self.identity = identity
        self._prepared = Prepared(self._pairs)

    def __call__(self, engine: Engine) -> Score:
        pairs, owners = self._prepared(engine.tokenizer)
        values = iter(logprobs(engine, pairs, lambda i: f"item {owners[i]}"))
        items, raw = [], 0
        for item in self.items:
            whole = [next(values) for _ in item.choices]
            weighed = [value / len(choice) for value, choice in zip(whole, item.choices)] if self.per_character else whole
            items.append(Item(item.id, item.group, float(_likeliest(item, weighed) == item.answer)))
            raw += _likeliest(item, whole) == item.answer
        details = {"accuracy_raw": raw / len(items)} if self.per_character else {}
        return Score(sum(item.score for item in items) / len(items), self.unit, len(items), items, details)

    def _pairs(self, tokenizer: Tokenizer) -> tuple[list[Pair], list[str]]:
        pairs: list[Pair] = []
        owners: list[str] = []
        for item, prompt in zip(self.items, self.prompts):
            pairs += pairs_of(tokenizer, prompt, [item.lead + choice for choice in item.choices])
            owners += [item.id] * len(item.choices)
        return pairs, owners


class Answer:
    """Exact match: greedy text after the prompt, cut before the first `until`, is a right answer once both are normalised.

    `matching.normalised` says how. `outputs.jsonl` keeps what the model wrote.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        items: Sequence[Example],
        prompts: Sequence[str],
        *,
        until: str,
        max_new_tokens: int,
        identity: Mapping[str, Any],
    ):
        self.name = name
        self.items, self.prompts = items, prompts
        self.until, self.max_new_tokens = until, max_new_tokens
        self.identity = identity
        asked = [Prompt(item.where, prompt) for item, prompt in zip(items, prompts)]
        self._prepared = Prepared(lambda tokenizer: (encoded(tokenizer, asked)[1], ending_tokens(tokenizer, until)))

    def __call__(self, engine: Engine) -> Score:
        ids, ends = self._prepared(engine.tokenizer)
        outputs = generated(engine, ids, self.max_new_tokens, self.until, ends)
        items = [
            Item(item.id, item.group, float(matches(output.text, item.answers))) for item, output in zip(self.items, outputs)
        ]
        written = json_lines(map(record, items, self.prompts, outputs))
        value = sum(item.score for item in items) / len(items)
        return Score(value, "exact match", len(items), items, figures(outputs), {"outputs.jsonl": written})


def _likeliest(item: Example, values: Sequence[float]) -> str:
    return item.choices[values.index(max(values))]


_ONLY = {"norm": "cloze", "until": "generate", "max_new_tokens": "generate"}


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    mode = spec.word("mode", ("cloze", "letter", "generate"))
    for option in spec.options.keys() & _ONLY.keys():
        if _ONLY[option] != mode:
            raise UsageError(f"`{spec.text}`: {option}= means nothing with mode={mode}", f"it is for mode={_ONLY[option]}")
    data = read_file(spec.path(spec.target))
    pool = read_file(spec.path(spec.options["pool"])) if "pool" in spec.options else None
    shots = Shots(spec.count("shots", 5, least=0), spec.string("sep", "\n\n"), pool, seed)
    asked = {
        "evaluator": "icl",
        "mode": mode,
        "shots": shots.count,
        "sep": shots.sep,
        "limit": limit,
        "seed": seed,
        "sha256": data.sha256,
        "pool_sha256": None if pool is None else pool.sha256,
    }
    if mode == "generate":
        ends: dict[str, Any] = {"until": _until(spec), "max_new_tokens": spec.count("max_new_tokens", 64, least=1)}
        return Answer(spec.column, *shots.ask(data, limit), **ends, identity={**asked, **ends})
    if mode == "letter":
        lettered = shots.ask(data, limit, Example.lettered)
        return Choice(spec.column, *lettered, unit="accuracy (letter)", per_character=False, identity=asked)
    norm = spec.word("norm", ("character", "none"))
    unit = "accuracy (per character)" if norm == "character" else "accuracy"
    return Choice(
        spec.column,
        *shots.ask(data, limit),
        unit=unit,
        per_character=norm == "character",
        identity={**asked, "norm": norm},
    )


def _until(spec: EvalSpec) -> str:
    text = spec.string("until", "\n")
    if not text:
        raise UsageError(f"`{spec.text}`: until= is empty, expected a text", "for example until=\\n")
    return text


KIND = Kind(
    "icl",
    "file",
    "icl:FILE.jsonl,shots=5,mode=cloze",
    ("shots", "mode", "pool", "sep", "norm", "until", "max_new_tokens"),
    _build,
    paths=("pool",),
)

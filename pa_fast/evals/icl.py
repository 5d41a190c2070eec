"""In-context learning: labelled examples, each asked after k others of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, Tokenizer
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.examples import Asked, Example, Shots
from pa_fast.evals.kind import EvalSpec, Kind
from pa_fast.evals.prompts import (
    WITH_SHOTS,
    Fitted,
    FittedPrompts,
    NewTokens,
    Overflow,
    Prompt,
    cut_left,
    each,
    fitted,
)
from pa_fast.evals.rows import matches, read_file
from pa_fast.evals.scores import (
    AVERAGES,
    Encoder,
    Pair,
    Prepared,
    averaged,
    ending_tokens,
    figures,
    generated,
    json_lines,
    labelled,
    logprobs,
    pairs_of,
    record,
    weighted,
)


class Choice:
    """Accuracy by likelihood: the likeliest choice is the model's answer, the first of equally
    likely ones.

    `ties` in the details counts the items of which different choices were equally likely.

    Modes: `cloze` scores the text of each choice, `letter` the letter under which the prompt lists
    it.

    Args:
        items, asked: the examples, and what stands before each choice.
        per_character: divide each log-likelihood by the length of the choice's text, as lm-eval's
            `acc_norm`; else it is taken as it is, as `acc`.
        overflow: what becomes of items that are too long, see `overflow.Overflow`.
        average: see `average.AVERAGES`.
        notes: said once, before the first λ.

    Raises:
        EvaluatorError: an item has no choices.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        items: Sequence[Example],
        asked: Sequence[Asked],
        *,
        unit: str,
        per_character: bool,
        overflow: str,
        average: str,
        identity: Mapping[str, Any],
        notes: Sequence[str] = (),
    ):
        each(items, _check_choices, "items")
        self.name = name
        self.items, self.asked = items, asked
        self.unit, self.per_character = unit, per_character
        self.overflow, self.average = overflow, average
        self.identity = identity
        self._notes = list(notes)
        self._prepared = Prepared(self._pairs)

    def check(self, engine: Engine) -> list[str]:
        """Raise if items cannot be asked, or do not fit the model; notes of what is changed."""
        return [*self._notes, *self._prepared(engine).notes]

    def __call__(self, engine: Engine) -> Score:
        asked = self._prepared(engine)
        scored = [self.items[index] for index in asked.kept]
        owners = [item.id for item, pairs in zip(scored, asked.requests) for _ in pairs]
        values = iter(logprobs(engine, list(chain(*asked.requests)), lambda i: f"item {owners[i]}"))
        items, raw, ties = [], [], 0
        for item in scored:
            whole = [next(values) for _ in item.choices]
            weighed = (
                [value / len(choice) for value, choice in zip(whole, item.choices)]
                if self.per_character
                else whole
            )
            items.append(
                Item(item.id, item.group, float(_likeliest(item, weighed)[0] == item.answer))
            )
            raw.append(Item(item.id, item.group, float(_likeliest(item, whole)[0] == item.answer)))
            ties += len(set(_likeliest(item, weighed))) > 1
        details = {"accuracy_raw": averaged(raw, self.average)} if self.per_character else {}
        unit = labelled(self.unit, [item.group for item in self.items], self.average)
        details |= {"ties": float(ties), **asked.figures}
        counted = weighted(items, self.average)
        return Score(averaged(items, self.average), unit, len(items), counted, details)

    def _pairs(self, tokenizer: Tokenizer, room: int | None) -> Fitted[list[Pair]]:
        prefix = Encoder(tokenizer).prefix

        def make(index: int, dropped: int) -> list[Pair]:
            item = self.items[index]
            try:
                return pairs_of(
                    tokenizer,
                    self.asked[index].text(dropped),
                    [item.lead + choice for choice in item.choices],
                )
            except EvaluatorError as error:
                raise EvaluatorError(f"{item.where}: {error.message}", error.hint) from None

        def cut(pairs: list[Pair], count: int) -> list[Pair] | None:
            context = cut_left(pairs[0][0], count, prefix)
            return None if context is None else [(context, answer) for _, answer in pairs]

        return Overflow(
            self.overflow,
            WITH_SHOTS,
            [item.where for item in self.items],
            [len(asked.shots) for asked in self.asked],
            make,
            lambda pairs: max(len(context) + len(answer) - 1 for context, answer in pairs),
            cut,
        ).fit(room)


class Answer:
    """Exact match: greedy text after the prompt, cut before the first `until`, is a right answer
    once both are normalised.

    `matching.normalised` says how. `outputs.jsonl` keeps what the model wrote.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        items: Sequence[Example],
        asked: Sequence[Asked],
        *,
        until: str,
        new_tokens: NewTokens,
        overflow: str,
        average: str,
        identity: Mapping[str, Any],
        notes: Sequence[str] = (),
    ):
        self.name = name
        self.items, self.asked = items, asked
        self.until, self.new_tokens = until, new_tokens
        self.overflow, self.average = overflow, average
        self.identity = identity
        self._notes = list(notes)
        self._prepared = Prepared(
            lambda tokenizer, room: (self._fitted(tokenizer, room), ending_tokens(tokenizer, until))
        )

    def check(self, engine: Engine) -> list[str]:
        """Raise if items do not fit the model; notes of what is changed."""
        return [*self._notes, *self._prepared(engine)[0].notes]

    def __call__(self, engine: Engine) -> Score:
        asked, ends = self._prepared(engine)
        outputs = generated(engine, asked.ids, asked.new_tokens, self.until, ends)
        scored = [self.items[index] for index in asked.kept]
        items = [
            Item(item.id, item.group, float(matches(output.text, item.answers)))
            for item, output in zip(scored, outputs)
        ]
        unit = labelled("exact match", [item.group for item in self.items], self.average)
        return Score(
            averaged(items, self.average),
            unit,
            len(items),
            weighted(items, self.average),
            {**figures(outputs), **asked.figures},
            {"outputs.jsonl": json_lines(map(record, items, asked.texts, outputs))},
        )

    def _fitted(self, tokenizer: Tokenizer, room: int | None) -> FittedPrompts:
        def prompt(index: int, dropped: int) -> Prompt:
            return Prompt(self.items[index].where, self.asked[index].text(dropped))

        return fitted(
            tokenizer,
            room,
            [prompt(index, 0) for index in range(len(self.items))],
            self.new_tokens,
            self.overflow,
            WITH_SHOTS,
            prompt,
            [len(asked.shots) for asked in self.asked],
        )


def _check_choices(item: Example) -> None:
    if not item.choices:
        raise EvaluatorError(
            f"{item.where}: found no choices; mode=cloze scores choices", "give the row `choices`"
        )


def _likeliest(item: Example, values: Sequence[float]) -> list[str]:
    """The likeliest choices, in the item's order."""
    best = max(values)
    return [choice for choice, value in zip(item.choices, values) if value == best]


_ONLY = {"norm": "cloze", "until": "generate", "max_new_tokens": "generate"}


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    mode = spec.word("mode", ("cloze", "letter", "generate"))
    for option in spec.options.keys() & _ONLY.keys():
        if _ONLY[option] != mode:
            raise UsageError(
                f"`{spec.text}`: {option}= means nothing with mode={mode}",
                f"it is for mode={_ONLY[option]}",
            )
    overflow, average = spec.word("overflow", WITH_SHOTS), spec.word("average", AVERAGES)
    how: dict[str, Any] = {"overflow": overflow, "average": average}
    data = read_file(spec.path(spec.target))
    pool = read_file(spec.path(spec.options["pool"])) if "pool" in spec.options else None
    shots = Shots(spec.count("shots", 5, least=0), spec.string("sep", "\n\n"), pool, seed)
    asked = {
        "evaluator": "icl",
        "mode": mode,
        "shots": shots.count,
        "sep": shots.sep,
        "overflow": overflow,
        "average": average,
        "limit": limit,
        "seed": seed,
        "sha256": data.sha256,
        "pool_sha256": None if pool is None else pool.sha256,
    }
    if mode == "generate":
        until = _until(spec)
        new_tokens = NewTokens(
            spec.count("max_new_tokens", 64, least=1), "max_new_tokens" not in spec.options
        )
        items, prompts, how["notes"] = shots.ask(data, limit)
        return Answer(
            spec.column,
            items,
            prompts,
            until=until,
            new_tokens=new_tokens,
            **how,
            identity={**asked, "until": until, "max_new_tokens": new_tokens.identity},
        )
    if mode == "letter":
        items, prompts, how["notes"] = shots.ask(data, limit, Example.lettered)
        return Choice(
            spec.column,
            items,
            prompts,
            unit="accuracy (letter)",
            per_character=False,
            **how,
            identity=asked,
        )
    norm = spec.word("norm", ("character", "none"))
    unit = "accuracy (per character)" if norm == "character" else "accuracy"
    items, prompts, how["notes"] = shots.ask(data, limit)
    return Choice(
        spec.column,
        items,
        prompts,
        unit=unit,
        per_character=norm == "character",
        **how,
        identity={**asked, "norm": norm},
    )


def _until(spec: EvalSpec) -> str:
    text = spec.string("until", "\n")
    if not text:
        raise UsageError(
            f"`{spec.text}`: until= is empty, expected a text", "for example until=\\n"
        )
    return text


KIND = Kind(
    "icl",
    "file",
    "icl:FILE.jsonl,shots=5,mode=cloze",
    ("shots", "mode", "pool", "sep", "norm", "until", "max_new_tokens", "overflow", "average"),
    _build,
    paths=("pool",),
)

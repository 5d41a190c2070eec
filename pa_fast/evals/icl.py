"""In-context learning: labelled examples, each scored after k others of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, Tokenizer
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.examples import Example, Shots, ShownItem
from pa_fast.evals.kind import EvalSpec, EvaluatorKind
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
    Prepared,
    TokenPair,
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

    `ties` in the details is the number of items of which different choices were equally likely.

    Modes: `cloze` scores the text of each choice, `letter` the letter under which the prompt lists
    it.

    Args:
        items, shown: the examples, and the prompt before each one's choices.
        per_character: divide each log-likelihood by the length of the choice's text, as lm-eval's
            `acc_norm`; else it is taken as it is, as `acc`.
        overflow: policy for items that are too long, see `prompts.Overflow`.
        average: see `scores.AVERAGES`.
        notes: notes of `check`, shown before the first λ.

    Raises:
        EvaluatorError: an item has no choices.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        items: Sequence[Example],
        shown: Sequence[ShownItem],
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
        self.items, self.shown = items, shown
        self.unit, self.per_character = unit, per_character
        self.overflow, self.average = overflow, average
        self.identity = identity
        self._notes = list(notes)
        self._prepared = Prepared(self._pairs)

    def check(self, engine: Engine) -> list[str]:
        """Raise if items cannot be encoded, or do not fit the model; return notes on items that are
        changed."""
        return [*self._notes, *self._prepared(engine).notes]

    def item_count(self, engine: Engine) -> int:
        """Return the number of items that are scored."""
        return len(self._prepared(engine).kept)

    def __call__(self, engine: Engine) -> Score:
        prepared = self._prepared(engine)
        scored = [self.items[index] for index in prepared.kept]
        owners = [item.id for item, pairs in zip(scored, prepared.requests) for _ in pairs]
        values = iter(
            logprobs(engine, list(chain(*prepared.requests)), lambda i: f"item {owners[i]}")
        )
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
        details |= {"ties": float(ties), **prepared.figures}
        counted = weighted(items, self.average)
        return Score(averaged(items, self.average), unit, len(items), counted, details)

    def _pairs(self, tokenizer: Tokenizer, positions: int | None) -> Fitted[list[TokenPair]]:
        prefix = Encoder(tokenizer).prefix

        def make(index: int, dropped: int) -> list[TokenPair]:
            item = self.items[index]
            try:
                return pairs_of(
                    tokenizer,
                    self.shown[index].text(dropped),
                    [item.lead + choice for choice in item.choices],
                )
            except EvaluatorError as error:
                raise EvaluatorError(f"{item.where}: {error.message}", error.hint) from None

        def cut(pairs: list[TokenPair], count: int) -> list[TokenPair] | None:
            context = cut_left(pairs[0][0], count, prefix)
            return None if context is None else [(context, answer) for _, answer in pairs]

        return Overflow(
            self.overflow,
            WITH_SHOTS,
            [item.where for item in self.items],
            [len(shown.shots) for shown in self.shown],
            make,
            lambda pairs: max(len(context) + len(answer) - 1 for context, answer in pairs),
            cut,
        ).fit(positions)


class ExactMatch:
    """Share of items whose greedy text, cut before the first `until`, is a right answer, after
    `rows.normalised` of both. `outputs.jsonl` keeps what the model wrote.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        items: Sequence[Example],
        shown: Sequence[ShownItem],
        *,
        until: str,
        new_tokens: NewTokens,
        overflow: str,
        average: str,
        identity: Mapping[str, Any],
        notes: Sequence[str] = (),
    ):
        self.name = name
        self.items, self.shown = items, shown
        self.until, self.new_tokens = until, new_tokens
        self.overflow, self.average = overflow, average
        self.identity = identity
        self._notes = list(notes)
        self._prepared = Prepared(
            lambda tokenizer, positions: (
                self._fitted(tokenizer, positions),
                ending_tokens(tokenizer, until),
            )
        )

    def check(self, engine: Engine) -> list[str]:
        """Raise if items do not fit the model; return notes on items that are changed."""
        return [*self._notes, *self._prepared(engine)[0].notes]

    def item_count(self, engine: Engine) -> int:
        """Return the number of items that are scored."""
        return len(self._prepared(engine)[0].kept)

    def __call__(self, engine: Engine) -> Score:
        prompts, stops = self._prepared(engine)
        outputs = generated(engine, prompts.ids, prompts.new_tokens, self.until, stops)
        scored = [self.items[index] for index in prompts.kept]
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
            {**figures(outputs), **prompts.figures},
            {"outputs.jsonl": json_lines(map(record, items, prompts.texts, outputs))},
        )

    def _fitted(self, tokenizer: Tokenizer, positions: int | None) -> FittedPrompts:
        def prompt(index: int, dropped: int) -> Prompt:
            return Prompt(self.items[index].where, self.shown[index].text(dropped))

        return fitted(
            tokenizer,
            positions,
            [prompt(index, 0) for index in range(len(self.items))],
            self.new_tokens,
            self.overflow,
            WITH_SHOTS,
            prompt,
            [len(shown.shots) for shown in self.shown],
        )


def _check_choices(item: Example) -> None:
    if not item.choices:
        raise EvaluatorError(
            f"{item.where}: found no choices; mode=cloze scores choices", "give the row `choices`"
        )


def _likeliest(item: Example, values: Sequence[float]) -> list[str]:
    """Return the likeliest choices, in the item's order."""
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
    options: dict[str, Any] = {"overflow": overflow, "average": average}
    data = read_file(spec.path(spec.target))
    pool = read_file(spec.path(spec.options["pool"])) if "pool" in spec.options else None
    shots = Shots(spec.count("shots", 5, least=0), spec.string("sep", "\n\n"), pool, seed)
    identity = {
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
        items, prompts, options["notes"] = shots.ask(data, limit)
        return ExactMatch(
            spec.column,
            items,
            prompts,
            until=until,
            new_tokens=new_tokens,
            **options,
            identity={**identity, "until": until, "max_new_tokens": new_tokens.identity},
        )
    if mode == "letter":
        items, prompts, options["notes"] = shots.ask(data, limit, Example.lettered)
        return Choice(
            spec.column,
            items,
            prompts,
            unit="accuracy (letter)",
            per_character=False,
            **options,
            identity=identity,
        )
    norm = spec.word("norm", ("character", "none"))
    unit = "accuracy (per character)" if norm == "character" else "accuracy"
    items, prompts, options["notes"] = shots.ask(data, limit)
    return Choice(
        spec.column,
        items,
        prompts,
        unit=unit,
        per_character=norm == "character",
        **options,
        identity={**identity, "norm": norm},
    )


def _until(spec: EvalSpec) -> str:
    text = spec.string("until", "\n")
    if not text:
        raise UsageError(
            f"`{spec.text}`: until= is empty, expected a text", "for example until=\\n"
        )
    return text


KIND = EvaluatorKind(
    "icl",
    "file",
    "icl:FILE.jsonl,shots=5,mode=cloze",
    ("shots", "mode", "pool", "sep", "norm", "until", "max_new_tokens", "overflow", "average"),
    _build,
    paths=("pool",),
)

"""Generation: prompts that the model answers in its own words, scored by a rule for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score
from pa_fast.errors import UsageError
from pa_fast.evals.average import AVERAGES, averaged, labelled, weighted
from pa_fast.evals.files import DataFile, limited, read_file
from pa_fast.evals.imported import Imported, imported
from pa_fast.evals.kind import EvalSpec, Kind
from pa_fast.evals.likelihood import Prepared
from pa_fast.evals.outputs import figures, generated, json_lines, record
from pa_fast.evals.overflow import POLICIES, each
from pa_fast.evals.prompts import NewTokens, fitted, read_prompt
from pa_fast.evals.rows import Row, distinct, read_rows
from pa_fast.evals.rules import rule_of

FIELDS = ("prompt", "messages", "id", "group", "regex", "answer")


class Generate:
    """Mean score of greedy outputs; an item is a prompt. `outputs.jsonl` keeps what the model
    wrote.

    Args:
        data: rows with a `prompt`, or with `messages` for the chat template, and what scores them
            (`rules.rule_of`).
        chat: wrap each prompt in the tokenizer's chat template, as one message of the user.
        new_tokens: the length of outputs.
        check: scores every output: called with the output and its row. It is tried at once, on an
            empty output of the first row, so that a checker that fails does so before a model is
            loaded.
        regex: scores the rows that have none of their own; searched for in the output.
        overflow: what becomes of prompts that are too long, see `overflow.Overflow`.
        average: see `average.AVERAGES`.

    Raises:
        EvaluatorError: a row is wrong, or nothing scores it.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: DataFile,
        *,
        chat: bool,
        new_tokens: NewTokens,
        check: Imported | None,
        regex: str | None,
        limit: int | None,
        seed: int,
        overflow: str = "refuse",
        average: str = "macro",
    ):
        self.name = name
        self.average = average
        rows = read_rows(data)
        distinct(rows)
        if check is None:  # a checker may want fields of any name
            for row in rows:
                row.refuse_misspelt(FIELDS)
        read = each(
            rows, lambda row: (row, read_prompt(row, chat), rule_of(row, check, regex)), "rows"
        )
        if check is not None:
            read[0][2].score("")
        groups = each(rows, lambda row: row.label("group", data.path.stem), "rows")
        kept = limited(read, groups, limit, seed)
        self.rows: Sequence[Row] = [row for row, _, _ in kept]
        self.groups = [row.label("group", data.path.stem) for row in self.rows]
        self.rules = [rule for _, _, rule in kept]
        prompts = [prompt for _, prompt, _ in kept]
        self.identity: Mapping[str, Any] = {
            "evaluator": "generate",
            "chat": chat,
            "max_new_tokens": new_tokens.identity,
            "check": None if check is None else check.target,
            "check_sha256": None if check is None else check.sha256,
            "regex": regex,
            "overflow": overflow,
            "average": average,
            "limit": limit,
            "seed": seed,
            "sha256": data.sha256,
        }
        self._prepared = Prepared(
            lambda tokenizer, room: fitted(tokenizer, room, prompts, new_tokens, overflow)
        )

    def check(self, engine: Engine) -> list[str]:
        """Raise if the tokenizer cannot write the prompts, or the model has no room for them; notes
        of what is changed."""
        return self._prepared(engine).notes

    def __call__(self, engine: Engine) -> Score:
        asked = self._prepared(engine)
        outputs = generated(engine, asked.ids, asked.new_tokens)
        items = [
            Item(self.rows[index].id, self.groups[index], self.rules[index].score(output.text))
            for index, output in zip(asked.kept, outputs)
        ]
        units = {rule.unit for rule in self.rules}
        unit = units.pop() if len(units) == 1 else "share right"
        return Score(
            averaged(items, self.average),
            labelled(unit, self.groups, self.average),
            len(items),
            weighted(items, self.average),
            {**figures(outputs), **asked.figures},
            {"outputs.jsonl": json_lines(map(record, items, asked.texts, outputs))},
        )


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    if {"check", "regex"} <= spec.options.keys():
        raise UsageError(
            f"`{spec.text}`: both check= and regex= would score every row", "keep one of the two"
        )
    return Generate(
        spec.column,
        read_file(spec.path(spec.target)),
        chat=spec.flag("chat", False),
        new_tokens=NewTokens(
            spec.count("max_new_tokens", 256, least=1), "max_new_tokens" not in spec.options
        ),
        check=(
            imported(spec.options["check"], "check", "a function of an output and its row")
            if "check" in spec.options
            else None
        ),
        regex=spec.options.get("regex"),
        limit=limit,
        seed=seed,
        overflow=spec.word("overflow", POLICIES),
        average=spec.word("average", AVERAGES),
    )


KIND = Kind(
    "generate",
    "file",
    "generate:FILE.jsonl,chat=true",
    ("chat", "max_new_tokens", "regex", "check", "overflow", "average"),
    _build,
)

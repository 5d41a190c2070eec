"""Generation: greedy outputs of prompts, each scored by a rule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.function import Imported, imported
from pa_fast.evals.kind import EvalSpec, EvaluatorKind
from pa_fast.evals.prompts import POLICIES, NewTokens, each, fitted, read_prompt
from pa_fast.evals.rows import (
    DataFile,
    DataRow,
    answers,
    check_distinct,
    limited,
    matches,
    read_file,
    read_rows,
)
from pa_fast.evals.scores import (
    AVERAGES,
    Prepared,
    averaged,
    figures,
    generated,
    json_lines,
    labelled,
    record,
    weighted,
)
from pa_fast.foreign import one_line


@dataclass(frozen=True)
class OutputRule:
    """The function output → score of one row, and the unit of its mean."""

    unit: str
    score: Callable[[str], float]


def rule_of(row: DataRow, check: Imported | None, regex: str | None) -> OutputRule:
    """Return the rule that scores `row`: the checker of the sweep, its own `regex`, that of the
    sweep, or its `answer`, in this order.

    Raises:
        EvaluatorError: there is none, or it is no regular expression, no answer.
    """
    if check is not None:
        return OutputRule(f"mean of {check.name}", lambda output: _checked(row, check, output))
    if "regex" in row.fields or regex is not None:
        pattern = _compiled(row.where, row.text("regex") if "regex" in row.fields else str(regex))
        return OutputRule("regex match", lambda output: float(pattern.search(output) is not None))
    if "answer" in row.fields:
        right = answers(row, "answer")
        return OutputRule("exact match", lambda output: float(matches(output, right)))
    raise EvaluatorError(
        f"{row.where}: found the fields {sorted(row.fields)}, and no rule that scores its output",
        "give the row a `regex` or an `answer`, or every row regex=… or check=module:function",
    )


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise EvaluatorError(
            f"{where}: `{one_line(pattern, 120)}` is not a regular expression: {error}",
            "Python's syntax; flags stand in it, such as (?i)",
        ) from None


def _checked(row: DataRow, check: Imported, output: str) -> float:
    try:
        returned = check.function(output, row.fields)
    except Exception as error:
        raise EvaluatorError(
            f"{row.where}: {check.target} failed: {type(error).__name__}: {error}",
            "it is called as function(output, row)",
        ) from error
    try:
        value = float(returned)  # numbers of NumPy and torch are numbers too
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(returned, str) or not math.isfinite(value):
        raise EvaluatorError(
            f"{row.where}: {check.target} returned {returned!r}, expected a finite number or a bool"
        )
    return value


# --- generation

FIELDS = ("prompt", "messages", "id", "group", "regex", "answer")


class Generate:
    """Mean score of greedy outputs; an item is a prompt. `outputs.jsonl` keeps what the model
    wrote.

    Args:
        data: rows with a `prompt`, or with `messages` for the chat template, and the fields of
            their rule (`rule_of`).
        chat: wrap each prompt in the tokenizer's chat template, as one message of the user.
        new_tokens: the length of outputs.
        check: scores every output: called with the output and its row. The constructor calls it on
            an empty output of the first row, so that it fails before a model is loaded.
        regex: scores the rows that have none of their own; searched for in the output.
        overflow: policy for prompts that are too long, see `prompts.Overflow`.
        average: see `scores.AVERAGES`.

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
        check_distinct(rows)
        if check is None:  # a checker may want fields of any name
            for row in rows:
                row.check_spelling(FIELDS)
        read = each(
            rows, lambda row: (row, read_prompt(row, chat), rule_of(row, check, regex)), "rows"
        )
        if check is not None:
            read[0][2].score("")
        groups = each(rows, lambda row: row.label("group", data.path.stem), "rows")
        kept = limited(read, groups, limit, seed)
        self.rows: Sequence[DataRow] = [row for row, _, _ in kept]
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
            lambda tokenizer, positions: fitted(tokenizer, positions, prompts, new_tokens, overflow)
        )

    def check(self, engine: Engine) -> list[str]:
        """Raise if the tokenizer cannot write the prompts, or the model has too few positions for
        them; return notes on prompts that are changed."""
        return self._prepared(engine).notes

    def item_count(self, engine: Engine) -> int:
        """Return the number of items that are scored."""
        return len(self._prepared(engine).kept)

    def __call__(self, engine: Engine) -> Score:
        prompts = self._prepared(engine)
        outputs = generated(engine, prompts.ids, prompts.new_tokens)
        items = [
            Item(self.rows[index].id, self.groups[index], self.rules[index].score(output.text))
            for index, output in zip(prompts.kept, outputs)
        ]
        units = {rule.unit for rule in self.rules}
        unit = units.pop() if len(units) == 1 else "share right"
        return Score(
            averaged(items, self.average),
            labelled(unit, self.groups, self.average),
            len(items),
            weighted(items, self.average),
            {**figures(outputs), **prompts.figures},
            {"outputs.jsonl": json_lines(map(record, items, prompts.texts, outputs))},
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


KIND = EvaluatorKind(
    "generate",
    "file",
    "generate:FILE.jsonl,chat=true",
    ("chat", "max_new_tokens", "regex", "check", "overflow", "average"),
    _build,
)

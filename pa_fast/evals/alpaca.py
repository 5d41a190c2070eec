"""AlpacaEval: the model's answers to instructions, in the form that its judges read."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, complete
from pa_fast.errors import EvaluatorError
from pa_fast.evals.kind import EvalSpec, EvaluatorKind
from pa_fast.evals.prompts import POLICIES, NewTokens, Prompt, chat, each, fitted
from pa_fast.evals.rows import DataFile, DataRow, check_distinct, limited, read_file, read_rows
from pa_fast.evals.scores import (
    AVERAGES,
    Prepared,
    averaged,
    figures,
    generated,
    labelled,
    weighted,
)


class Alpaca:
    """Answers to instructions, written as `model_outputs.json` at each λ for a judge to score.

    Its own score is the share of answers that end before `max_new_tokens`; answers that are cut
    there are judged as they are. An item is an instruction.

    Args:
        data: rows with an `instruction`, and optionally `dataset`, `datasplit` and `id`.
        chat: put each instruction into the tokenizer's chat template, as one message of the user.
        max_new_tokens: at most so many, and no more than the longest prompt leaves of the model's
            positions.
        overflow: policy for prompts that leave too few positions for an answer, see
            `NewTokens.least` and `prompts.Overflow`.
        average: see `scores.AVERAGES`.
        generator: the name in the outputs, before `@lam=…`; the names of the engine's two folders
            if not given.

    Raises:
        EvaluatorError: a row is wrong.
    Source: AlpacaEval 2 (alpaca_eval 0.6.6): verbatim instructions, rows in order, one generator
    per file.
    """

    higher_is_better = True

    def __init__(
        self,
        name: str,
        data: DataFile,
        *,
        chat: bool,
        max_new_tokens: int,
        generator: str | None,
        limit: int | None,
        seed: int,
        overflow: str = "refuse",
        average: str = "macro",
    ):
        self.name = name
        self.average = average
        self.generator = generator
        rows = read_rows(data)
        check_distinct(rows)
        read = each(rows, lambda row: _fields(row, data.path.stem), "rows")
        kept = limited(list(zip(rows, read)), [fields["dataset"] for fields in read], limit, seed)
        self.ids = [row.id for row, _ in kept]
        self.rows = [fields for _, fields in kept]
        prompts = [_prompt(row.where, fields["instruction"], chat) for row, fields in kept]
        self.identity: Mapping[str, Any] = {
            "evaluator": "alpaca",
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "generator": generator,
            "overflow": overflow,
            "average": average,
            "limit": limit,
            "seed": seed,
            "sha256": data.sha256,
        }
        self._prepared = Prepared(
            lambda tokenizer, positions: fitted(
                tokenizer, positions, prompts, NewTokens(max_new_tokens, capped=True), overflow
            )
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
        rows, names = (
            [self.rows[index] for index in prompts.kept],
            [self.ids[index] for index in prompts.kept],
        )
        generator = f"{self.generator or _pair(engine)}@lam={lambda_text(engine.weights.lam)}"
        judged = [
            {
                "instruction": row["instruction"],
                "output": output.text,
                "generator": generator,
                "dataset": row["dataset"],
                "datasplit": row["datasplit"],
            }
            for row, output in zip(rows, outputs)
        ]
        items = [
            Item(name, row["dataset"], float(not output.truncated))
            for name, row, output in zip(names, rows, outputs)
        ]
        return Score(
            averaged(items, self.average),
            labelled(
                "share of answers that end", [row["dataset"] for row in self.rows], self.average
            ),
            len(items),
            weighted(items, self.average),
            {**figures(outputs), **prompts.figures},
            {"model_outputs.json": json.dumps(judged, ensure_ascii=False, indent=2) + "\n"},
        )


def _fields(row: DataRow, dataset: str) -> dict[str, str]:
    if "instruction" not in row.fields:
        raise EvaluatorError(
            f"{row.where}: found the fields {sorted(row.fields)}, expected `instruction`",
            "every row needs one",
        )
    return {
        "instruction": row.text("instruction"),
        "dataset": row.label("dataset", dataset),
        "datasplit": row.label("datasplit", "eval"),
    }


def _prompt(where: str, instruction: str, as_chat: bool) -> Prompt:
    return chat(where, instruction) if as_chat else Prompt(where, instruction)


def _pair(engine: Engine) -> str:
    """Return `base+instruct`: the last parts of the names that the two checkpoints were loaded
    by."""
    sides = [complete(engine).configuration.get(side) for side in ("base", "instruct")]
    return "+".join(pathlib.PurePath(str(side)).name for side in sides if side) or "pair"


def lambda_text(lam: float | None) -> str:
    """Return λ in four decimals where these are exact, else in all its digits, so that no two λ are
    spelt alike."""
    if lam is None:
        raise EvaluatorError("the weights are at no λ", "set one first")
    short = f"{lam:.4f}"
    return short if float(short) == lam else repr(float(lam))


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    return Alpaca(
        spec.column,
        read_file(spec.path(spec.target)),
        chat=spec.flag("chat", True),
        max_new_tokens=spec.count("max_new_tokens", 2048, least=1),
        generator=spec.options.get("generator"),
        limit=limit,
        seed=seed,
        overflow=spec.word("overflow", POLICIES),
        average=spec.word("average", AVERAGES),
    )


KIND = EvaluatorKind(
    "alpaca",
    "file",
    "alpaca:FILE.json,max_new_tokens=2048",
    ("chat", "max_new_tokens", "generator", "overflow", "average"),
    _build,
)

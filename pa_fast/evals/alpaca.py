"""AlpacaEval: what the model answers to instructions, in the form that its judges read."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score, configuration
from pa_fast.errors import EvaluatorError
from pa_fast.evals.files import DataFile, limited, read_file
from pa_fast.evals.kind import EvalSpec, Kind
from pa_fast.evals.likelihood import Prepared
from pa_fast.evals.outputs import figures, generated
from pa_fast.evals.prompts import Prompt, chat, encoded
from pa_fast.evals.rows import distinct, read_rows


class Alpaca:
    """Writes `model_outputs.json` at each λ, ready for a judge, which decides what the answers are worth.

    Its own score is the share of answers that came to an end by themselves: one that was cut at `max_new_tokens` is
    judged as it stands. An item is an instruction.

    Args:
        data: rows with an `instruction`, and optionally `dataset`, `datasplit` and `id`.
        chat: put each instruction into the tokenizer's chat template, as one message of the user.
        generator: the name in the outputs, before `@lam=…`; the names of the engine's two folders if not given.

    Raises:
        EvaluatorError: a row is wrong; at the first λ: the tokenizer cannot write the prompts.
    Source: AlpacaEval 2 (alpaca_eval 0.6.6): verbatim instructions, rows in order, one generator per file.
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
    ):
        self.name = name
        self.generator, self.max_new_tokens = generator, max_new_tokens
        rows = read_rows(data)
        distinct(rows)
        for row in rows:
            if "instruction" not in row.fields:
                raise EvaluatorError(
                    f"{row.where}: found the fields {sorted(row.fields)}, expected `instruction`", "every row needs one"
                )
        kept = limited(rows, limit, seed)
        self.ids = [row.id for row in kept]
        self.rows = [
            {
                "instruction": row.text("instruction"),
                "dataset": row.label("dataset", data.path.stem),
                "datasplit": row.label("datasplit", "eval"),
            }
            for row in kept
        ]
        prompts = [_prompt(row.where, fields["instruction"], chat) for row, fields in zip(kept, self.rows)]
        self.identity: Mapping[str, Any] = {
            "evaluator": "alpaca",
            "chat": chat,
            "max_new_tokens": max_new_tokens,
            "generator": generator,
            "limit": limit,
            "seed": seed,
            "sha256": data.sha256,
        }
        self._prepared = Prepared(lambda tokenizer: encoded(tokenizer, prompts)[1])

    def __call__(self, engine: Engine) -> Score:
        outputs = generated(engine, self._prepared(engine.tokenizer), self.max_new_tokens)
        generator = f"{self.generator or _pair(engine)}@lam={_spelt(engine.weights.lam)}"
        judged = [
            {"instruction": row["instruction"], "output": output.text, "generator": generator, "dataset": row["dataset"],
             "datasplit": row["datasplit"]}
            for row, output in zip(self.rows, outputs)
        ]  # fmt: skip
        items = [Item(id, row["dataset"], float(not output.truncated)) for id, row, output in zip(self.ids, self.rows, outputs)]
        return Score(
            sum(item.score for item in items) / len(items),
            "share of answers that end",
            len(items),
            items,
            figures(outputs),
            {"model_outputs.json": json.dumps(judged, ensure_ascii=False, indent=2) + "\n"},
        )


def _prompt(where: str, instruction: str, as_chat: bool) -> Prompt:
    return chat(where, instruction) if as_chat else Prompt(where, instruction)


def _pair(engine: Engine) -> str:
    """`base+instruct`: the last parts of the names that the two checkpoints were loaded by."""
    sides = [configuration(engine).get(side) for side in ("base", "instruct")]
    return "+".join(pathlib.PurePath(str(side)).name for side in sides if side) or "pair"


def _spelt(lam: float | None) -> str:
    """λ in four decimals where they say it exactly, else in all its digits: no two λ are spelt alike."""
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
    )


KIND = Kind("alpaca", "file", "alpaca:FILE.json,max_new_tokens=2048", ("chat", "max_new_tokens", "generator"), _build)

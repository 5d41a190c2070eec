"""The user's own evaluator: any function of an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score
from pa_fast.errors import EvaluatorError
from pa_fast.evals.imported import imported
from pa_fast.evals.kind import EvalSpec, Kind


class Function:
    """`module:function(engine) -> Score`, imported with the current directory on the path.

    The function may carry `higher_is_better` (default True) and `identity`, a mapping of JSON values that must be the
    same for a sweep to resume; the digest of its module's source is always part of that. It chooses its own items: a
    sweep's `--limit` and `--seed` are not its concern.

    Raises:
        UsageError: the target is not `module:function`.
        EvaluatorError: the module does not import, or has no such function.
    """

    def __init__(self, name: str, target: str):
        found = imported(target, "python", "a function of an engine")
        self.name = name
        self.target = target
        self.function = found.function
        self.higher_is_better: bool = getattr(found.function, "higher_is_better", True)
        self.identity: Mapping[str, Any] = {
            "evaluator": "python",
            "target": target,
            "sha256": found.sha256,
            **getattr(found.function, "identity", {}),
        }

    def __call__(self, engine: Engine) -> Score:
        score = self.function(engine)
        if not isinstance(score, Score):
            raise EvaluatorError(
                f"{self.target} returned a {type(score).__name__}, expected a pa_fast.base.Score", "return Score(…)"
            )
        try:
            value = float(score.value)  # numbers of NumPy and torch are numbers too
        except (TypeError, ValueError):
            value = math.nan
        if isinstance(score.value, (bool, str)) or not math.isfinite(value):
            raise EvaluatorError(f"{self.target}: Score.value is {score.value!r}, expected a finite number")
        if not isinstance(score.unit, str) or isinstance(score.n, bool) or not isinstance(score.n, int) or score.n < 0:
            raise EvaluatorError(f"{self.target}: Score has unit {score.unit!r}, n {score.n!r}; expected a text and a count")
        for item in score.items:
            if not isinstance(item, Item):
                raise EvaluatorError(f"{self.target}: Score.items holds a {type(item).__name__}, expected pa_fast.base.Item")
        return replace(score, value=value)


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    return Function(spec.column, spec.target)


KIND = Kind("python", "function", "python:package.module:function", (), _build, label=lambda target: target.rpartition(":")[2])

"""The user's own evaluator: any function of an engine."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pa_fast.base import Engine, Item, Score
from pa_fast.errors import EvaluatorError, UsageError


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
        module_name, _, attribute = target.partition(":")
        if not module_name or not attribute:
            raise UsageError(f"python: `{target}` is not module:function", "write for example python:my_package.scores:follow")
        self.name = name
        self.target = target
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise EvaluatorError(
                f"python: module `{module_name}` does not import: {type(error).__name__}: {error}",
                f"it is searched for in {os.getcwd()} first, then where Python looks",
            ) from error
        function = getattr(module, attribute, None)
        if not callable(function):
            found = "nothing" if function is None else f"a {type(function).__name__}"
            raise EvaluatorError(f"python: `{target}` is {found}, expected a function of an engine", "check its name")
        self.function = function
        self.higher_is_better: bool = getattr(function, "higher_is_better", True)
        source = getattr(module, "__file__", None)
        self.identity: Mapping[str, Any] = {
            "evaluator": "python",
            "target": target,
            "sha256": hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest() if source else None,
            **getattr(function, "identity", {}),
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

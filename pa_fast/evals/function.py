"""Evaluators that call a function of the user, named `python:module:function` or passed as such."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Score
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.kind import EvalSpec, EvaluatorKind
from pa_fast.foreign import one_line


@dataclass(frozen=True)
class Imported:
    """A function, its `module:name`, and the SHA-256 of its module's source, None where that is no
    file."""

    target: str
    function: Callable[..., Any]
    sha256: str | None

    @property
    def name(self) -> str:
        return self.target.rpartition(":")[2]


def imported(target: str, option: str, expected: str) -> Imported:
    """Import `module:function` with the current directory on the path. `option` and `expected` are
    for error messages.

    Raises:
        UsageError: the target is not `module:function`.
        EvaluatorError: the module does not import, or has no such function.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UsageError(
            f"{option}: `{target}` is not module:function",
            "write for example my_package.scores:follow",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise EvaluatorError(
            f"{option}: module `{module_name}` does not import: {type(error).__name__}: {error}",
            f"it is searched for in {os.getcwd()} first, then where Python looks",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        kind = "nothing" if function is None else f"a {type(function).__name__}"
        raise EvaluatorError(
            f"{option}: `{target}` is {kind}, expected {expected}", "check its name"
        )
    source = getattr(module, "__file__", None)
    return Imported(
        target,
        function,
        hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest() if source else None,
    )


# --- function


class Function:
    """An evaluator that calls `function(engine)`, which returns a number, a mapping of numbers or a
    `Score`.

    The function may carry `higher_is_better` (default True), `check`, as an `Evaluator` may, and
    `identity`, a mapping of JSON values that must be the same for a sweep to resume; the digest of
    its source is always part of that. It chooses its own items; a sweep's limit and seed do not
    apply to it.

    Args:
        name: the column.
        target: the function's name in errors.
        kind: `python` or `function`, the first entry of the identity.
        sha256: of its source, None where there is none to read.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Engine], Any],
        *,
        target: str,
        kind: str,
        sha256: str | None,
    ):
        self.name = name
        self.target = target
        self.function = function
        self.higher_is_better: bool = getattr(function, "higher_is_better", True)
        self.identity: Mapping[str, Any] = {
            "evaluator": kind,
            "target": target,
            "sha256": sha256,
            **getattr(function, "identity", {}),
        }
        if hasattr(function, "check"):
            self.check = function.check

    def __call__(self, engine: Engine) -> Score:
        return as_score(self.function(engine), self.target)


def of_callable(function: Callable[[Engine], Any], name: str | None = None) -> Function:
    """Return an evaluator that calls `function`, or another callable that is none yet; its own name
    is the default.

    Raises:
        UsageError: it has no name, as a lambda function has none.
    """
    own = getattr(function, "name", None) or getattr(function, "__name__", None)
    name = name or (own if own != "<lambda>" else None)
    if not isinstance(name, str):
        what = "a lambda function" if own else f"a {type(function).__name__}"
        raise UsageError(
            f"{what} has no name, and each evaluator is a column",
            'name it: pa_fast.evaluator(…, name="my score")',
        )
    return Function(name, function, target=name, kind="function", sha256=_source_sha256(function))


def as_score(returned: Any, target: str) -> Score:
    """Return what the function `target` returned as a `Score`.

    A number is a score of one item. Of a mapping the entry `score`, else `value`, else the only one
    is the score, and the others are its details. Scalars of NumPy and torch are numbers.

    Raises:
        EvaluatorError: it is none of these, or a number is not finite.
    """
    if isinstance(returned, Score):
        return _checked(returned, target)
    if isinstance(returned, Mapping):
        return _of_mapping(returned, target)
    value = _number(returned)
    if value is None:
        shown = (
            repr(returned)
            if isinstance(returned, (bool, int, float))
            else f"a {type(returned).__name__}"
        )
        raise EvaluatorError(
            f"{target} returned {shown}, expected a finite number, a dict of them or a Score", _HINT
        )
    return Score(value, "score", 1)


def _of_mapping(returned: Mapping[Any, Any], target: str) -> Score:
    keys = ", ".join(f"`{one_line(str(key), 40)}`" for key in list(returned)[:20]) or "nothing"
    key = next(
        (key for key in ("score", "value") if key in returned),
        next(iter(returned)) if len(returned) == 1 else None,
    )
    if key is None:
        raise EvaluatorError(
            f"{target} returned a dict of {keys}: which is the score?",
            "call it `score`; the others are kept as details",
        )
    numbers = {str(key): _number(value) for key, value in returned.items()}
    for name, number in numbers.items():
        if number is None:
            shown = one_line(repr(returned.get(name)), 60)
            raise EvaluatorError(
                f"{target} returned a dict whose `{name}` is {shown}, expected a finite number",
                _HINT,
            )
    known = {name: number for name, number in numbers.items() if number is not None}
    value = known.pop(str(key))
    return Score(value, "score" if key in ("score", "value") else str(key), 1, details=known)


def _checked(score: Score, target: str) -> Score:
    value = _number(score.value)
    if value is None:
        raise EvaluatorError(f"{target}: Score.value is {score.value!r}, expected a finite number")
    if (
        not isinstance(score.unit, str)
        or isinstance(score.n, bool)
        or not isinstance(score.n, int)
        or score.n < 0
    ):
        raise EvaluatorError(
            f"{target}: Score has unit {score.unit!r}, n {score.n!r}; expected a text and a count"
        )
    for item in score.items:
        if not isinstance(item, Item):
            raise EvaluatorError(
                f"{target}: Score.items holds a {type(item).__name__}, expected pa_fast.base.Item"
            )
    return replace(score, value=value)


def _number(value: Any) -> float | None:
    """Return `value` as a float, None where it is no finite number. Tensors and arrays of one
    element are numbers."""
    try:
        value = value.item() if hasattr(value, "item") else value
        number = (
            float(value)
            if hasattr(value, "__float__") and not isinstance(value, bool)
            else math.nan
        )
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _source_sha256(function: Any) -> str | None:
    """Return the digest of the source of `function`, or of its class; None where there is none, as
    behind `exec`."""
    while isinstance(function, functools.partial):
        function = function.func
    described = function if inspect.isroutine(function) else type(function)
    try:
        source = textwrap.dedent(inspect.getsource(described))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    target = imported(spec.target, "python", "a function of an engine")
    return Function(
        spec.column, target.function, target=spec.target, kind="python", sha256=target.sha256
    )


_HINT = "for a unit, a count or items return pa_fast.Score(…)"


KIND = EvaluatorKind(
    "python",
    "function",
    "python:package.module:function",
    (),
    _build,
    label=lambda target: target.rpartition(":")[2],
)

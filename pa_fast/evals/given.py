"""Evaluators as callers give them: EVAL strings, suites, functions and objects."""

from __future__ import annotations

import inspect
import os
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

from pa_fast.base import Engine, Evaluator
from pa_fast.errors import UsageError
from pa_fast.evals import function, spec
from pa_fast.evals.kind import EvalSpec
from pa_fast.evals.suite import parse_all, read_suite

Given: TypeAlias = "str | os.PathLike[str] | Evaluator | Callable[[Engine], Any]"
"""An evaluator as a caller may write it; a suite, a path or a string that ends in .yaml, is
several."""


def evaluators(
    given: Given | Iterable[Given], *, limit: int | None = None, seed: int = 0
) -> list[Evaluator]:
    """Return the evaluators that `given` names or is, one or many; see `evaluator`."""
    many = (
        [given]
        if isinstance(given, (str, os.PathLike))
        or callable(given)
        or not isinstance(given, Iterable)
        else given
    )
    return [built for one in many for built in _built(one, None, limit, seed)]


def evaluator(
    given: Given, *, name: str | None = None, limit: int | None = None, seed: int = 0
) -> Evaluator:
    """Return the evaluator that `given` names or is, its data read and checked.

    Args:
        given: an EVAL string, such as `"icl:tasks.jsonl,shots=5"`; a YAML suite of one; a function
            of an engine that returns a number, a mapping of numbers or a `Score`; or an
            `Evaluator`, which is returned as it is.
        name: its column in results, instead of the one that `given` has.
        limit: most items, drawn with `seed`; functions and objects choose their own items.

    Example:
        accuracy = pa_fast.evaluator("icl:tasks.jsonl,shots=5", name="accuracy")
        lm.set_lambda(0.6)
        print(accuracy(lm).value)

    Raises:
        UsageError: a malformed EVAL, a suite of several, a function without a name, or nothing that
            could evaluate.
        EvaluatorError: a data file or suite is wrong.
    """
    built = _built(given, name, limit, seed)
    if len(built) != 1:
        raise UsageError(
            f"{given} lists {len(built)} evaluators, expected one",
            "pass the suite itself to pa_fast.sweep",
        )
    return built[0]


def _built(given: Any, name: str | None, limit: int | None, seed: int) -> list[Evaluator]:
    if isinstance(given, (str, os.PathLike)):
        specs = parse_all([given]) if isinstance(given, str) else read_suite(pathlib.Path(given))
        if name is not None and len(specs) == 1:
            specs = [_renamed(specs[0], name)]
        return [spec.build(one, limit=limit, seed=seed) for one in specs]
    if inspect.isclass(given):
        raise UsageError(
            f"the class {given.__name__} is not an evaluator",
            f"pass one of its objects: {given.__name__}(…)",
        )
    # functions may carry `name` and `higher_is_better` and still return a bare number
    if isinstance(given, Evaluator) and not inspect.isroutine(given):
        if name not in (None, given.name):
            raise UsageError(
                f"the evaluator `{given.name}` has a name of its own", "set its `name`"
            )
        return [given]
    if callable(given):
        return [function.of_callable(given, name)]
    raise UsageError(
        f"a {type(given).__name__} is not an evaluator",
        f"pass an EVAL string such as {spec.EXAMPLES['icl']}, a function of an engine, or an object"
        " with name, higher_is_better and __call__(engine)",
    )


def _renamed(one: EvalSpec, name: str) -> EvalSpec:
    options = {**one.options, "name": name}
    named = spec.checked(one.text, one.name, one.targets, options, one.folder)
    return replace(named, where=one.where)

"""Rules: what makes an output right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from pa_fast.errors import EvaluatorError
from pa_fast.evals.imported import Imported
from pa_fast.evals.matching import answers, matches
from pa_fast.evals.rows import Row
from pa_fast.foreign import one_line


@dataclass(frozen=True)
class Rule:
    """Output → score of one row, and the unit of its mean."""

    unit: str
    score: Callable[[str], float]


def rule_of(row: Row, check: Imported | None, regex: str | None) -> Rule:
    """The rule that scores `row`: the checker of the sweep, its own `regex`, that of the sweep, or
    its `answer`, in this order.

    Raises:
        EvaluatorError: there is none, or it is no regular expression, no answer.
    """
    if check is not None:
        return Rule(f"mean of {check.name}", lambda output: _checked(row, check, output))
    if "regex" in row.fields or regex is not None:
        pattern = _compiled(row.where, row.text("regex") if "regex" in row.fields else str(regex))
        return Rule("regex match", lambda output: float(pattern.search(output) is not None))
    if "answer" in row.fields:
        right = answers(row, "answer")
        return Rule("exact match", lambda output: float(matches(output, right)))
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


def _checked(row: Row, check: Imported, output: str) -> float:
    try:
        found = check.function(output, row.fields)
    except Exception as error:
        raise EvaluatorError(
            f"{row.where}: {check.target} failed: {type(error).__name__}: {error}",
            "it is called as function(output, row)",
        ) from error
    try:
        value = float(found)  # numbers of NumPy and torch are numbers too
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(found, str) or not math.isfinite(value):
        raise EvaluatorError(
            f"{row.where}: {check.target} returned {found!r}, expected a finite number or a bool"
        )
    return value

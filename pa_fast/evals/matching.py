"""Exact match: when a generated text is the right answer."""

from __future__ import annotations

from collections.abc import Iterable

from pa_fast.errors import EvaluatorError
from pa_fast.evals.rows import Row


def normalised(text: str) -> str:
    """`text` in one case, runs of white space as one space, none at the ends, without the
    punctuation that ends it.

    What is punctuation alone stays, so that no answer is empty.
    """
    text = " ".join(text.casefold().split())
    return text.rstrip(".,;:!? ") or text


def matches(output: str, answers: Iterable[str]) -> bool:
    """Whether `output` is one of `answers`, both normalised."""
    return normalised(output) in map(normalised, answers)


def answers(row: Row, field: str) -> tuple[str, ...]:
    """The right answers of a row: a text, or a list of texts of which each is right.

    Raises:
        EvaluatorError: it is neither, or one is blank.
    """
    value = row.fields[field]
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(one, str) and one.strip() for one in listed):
        raise EvaluatorError(
            f"{row.where}: answer {value!r} is not a text, nor a list of texts",
            "write the right answer as a text",
        )
    return tuple(listed)

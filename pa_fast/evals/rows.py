"""Data files of evaluators, read and checked row by row, and the comparison of outputs with
answers."""

from __future__ import annotations

import difflib
import hashlib
import json
import pathlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pa_fast.errors import EvaluatorError
from pa_fast.files import path_of

T = TypeVar("T")


@dataclass(frozen=True)
class DataFile:
    """A data file as text, with the SHA-256 of its bytes."""

    path: pathlib.Path
    text: str
    sha256: str


def read_file(path: str | pathlib.Path, what: str = "data file") -> DataFile:
    """Read a UTF-8 file; a byte-order mark is dropped. `what` it is stands in errors.

    Raises:
        UsageError: `path` is none.
        EvaluatorError: it cannot be read, or is not UTF-8.
    """
    path = path_of(path, what)
    try:
        raw = path.read_bytes()
        return DataFile(path, raw.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest())
    except OSError as error:
        raise EvaluatorError(
            f"{path} cannot be read: {error.strerror or error}",
            (
                f"name the {what}, not its folder"
                if isinstance(error, IsADirectoryError)
                else f"check the path of the {what}"
            ),
        ) from None
    except ValueError as error:
        raise EvaluatorError(f"{path} is not UTF-8: {error}", f"save the {what} as UTF-8") from None


def limited(rows: Sequence[T], groups: Sequence[str], limit: int | None, seed: int) -> list[T]:
    """Return at most `limit` of N `rows`, drawn with `seed`, in their own order: the same number
    from each of the `groups` that the rows belong to, as far as it has them. Every evaluator's
    limit is this one.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    kept: list[int] = []
    for number, indices in enumerate(sorted(members.values(), key=len)):
        # larger groups make up for smaller ones
        share = min(len(indices), (limit - len(kept)) // (len(members) - number))
        kept += random.Random(f"{seed}:limit").sample(indices, share)
    return [rows[index] for index in sorted(kept)]


# --- rows


@dataclass(frozen=True)
class DataRow:
    """One row, a JSON object: where it is, for error messages; the number of its line or list item,
    from 1; and its fields."""

    where: str
    number: int
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.label("id", str(self.number))

    def label(self, field: str, default: str) -> str:
        """Return a field that names something, such as `id` or `group`: a text or a whole
        number."""
        value = self.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise EvaluatorError(
                f"{self.where}: `{field}` is {value!r}, expected a text or a number",
                "or leave it out",
            )
        return str(value)

    def text(self, field: str) -> str:
        """Return a field that must be a text, and not a blank one."""
        value = self.fields[field]
        if not isinstance(value, str) or not value.strip():
            raise EvaluatorError(
                f"{self.where}: `{field}` is {value!r}, expected a text", "every row needs one"
            )
        return value

    def check_spelling(self, known: Iterable[str]) -> None:
        """Raise EvaluatorError for a field that is nearly one of `known`; others are the user's
        own."""
        for name in self.fields.keys() - set(known):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            if near and near[0] not in self.fields:
                raise EvaluatorError(
                    f"{self.where}: there is no field `{name}`", f"did you mean {near[0]}?"
                )


def read_rows(data: DataFile) -> list[DataRow]:
    """Return the rows of a file, in its order: the objects of one JSON list (`.json`), or one a
    line, empty lines skipped.

    Raises:
        EvaluatorError: a row is not a JSON object or not Unicode, or there is none.
    """
    rows = (
        _listed(data)
        if data.path.suffix == ".json" and data.text.lstrip().startswith("[")
        else _lines(data)
    )
    if not rows:
        raise EvaluatorError(f"{data.path} is empty", "give it at least one row")
    for row in rows:
        if not isinstance(row.fields, dict):
            raise EvaluatorError(
                f"{row.where}: found a JSON {type(row.fields).__name__}, expected an object", _HOW
            )
        try:
            # \ud800 alone is valid JSON, and no text that a tokenizer or a results file could take
            json.dumps(row.fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise EvaluatorError(
                f"{row.where}: not Unicode text ({error.reason})", "leave out unpaired surrogates"
            ) from None
    return rows


def check_distinct(rows: Iterable[DataRow]) -> None:
    """Raise EvaluatorError if two rows share an id."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise EvaluatorError(
                f"{row.where}: id `{row.id}` was already used at {seen[row.id]}",
                "ids must be unique",
            )
        seen[row.id] = row.where


_HOW = "write one JSON object a line, or in a .json file a list of them"


def _lines(data: DataFile) -> list[DataRow]:
    # split at \n alone: str.splitlines also breaks at U+2028 and others, which JSON allows inside a
    # string
    lines = enumerate(data.text.split("\n"), start=1)
    return [
        DataRow(f"{data.path}:{number}", number, _json(f"{data.path}:{number}", line))
        for number, line in lines
        if line.strip()
    ]


def _listed(data: DataFile) -> list[DataRow]:
    rows = enumerate(_json(str(data.path), data.text), start=1)
    return [DataRow(f"{data.path}: row {number}", number, row) for number, row in rows]


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluatorError(f"{where}: not JSON ({error})", _HOW) from None


# --- matching


def normalised(text: str) -> str:
    """Return `text` in one case, with runs of white space as one space, none at either end, and
    without punctuation at its end.

    A text of punctuation alone stays, so that no answer is empty.
    """
    text = " ".join(text.casefold().split())
    return text.rstrip(".,;:!? ") or text


def matches(output: str, answers: Iterable[str]) -> bool:
    """Return whether `output` is one of `answers`, both normalised."""
    return normalised(output) in map(normalised, answers)


def answers(row: DataRow, field: str) -> tuple[str, ...]:
    """Return the right answers of a row: a text, or a list of texts of which each is right.

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

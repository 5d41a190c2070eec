"""Rows of a data file: JSON objects that know where they stand."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import EvaluatorError
from pa_fast.evals.files import DataFile


@dataclass(frozen=True)
class Row:
    """One row: its place for error messages, its number in the file (of the line, or in a list;
    from 1) and its fields."""

    where: str
    number: int
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.label("id", str(self.number))

    def label(self, field: str, default: str) -> str:
        """A field that names something, such as `id` or `group`: a text or a whole number."""
        value = self.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise EvaluatorError(
                f"{self.where}: `{field}` is {value!r}, expected a text or a number",
                "or leave it out",
            )
        return str(value)

    def text(self, field: str) -> str:
        """A field that must be a text, and not a blank one."""
        value = self.fields[field]
        if not isinstance(value, str) or not value.strip():
            raise EvaluatorError(
                f"{self.where}: `{field}` is {value!r}, expected a text", "every row needs one"
            )
        return value

    def refuse_misspelt(self, known: Iterable[str]) -> None:
        """Refuse a field that is nearly one of `known`; others are the user's own."""
        for name in self.fields.keys() - set(known):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            if near and near[0] not in self.fields:
                raise EvaluatorError(
                    f"{self.where}: there is no field `{name}`", f"did you mean {near[0]}?"
                )


def read_rows(data: DataFile) -> list[Row]:
    """The rows of a file, in its order: the objects of one JSON list (`.json`), or one a line,
    empty lines skipped.

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


def distinct(rows: Iterable[Row]) -> None:
    """Refuse an id that two rows share."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise EvaluatorError(
                f"{row.where}: id `{row.id}` was already used at {seen[row.id]}",
                "ids must be unique",
            )
        seen[row.id] = row.where


_HOW = "write one JSON object a line, or in a .json file a list of them"


def _lines(data: DataFile) -> list[Row]:
    # split at \n alone: str.splitlines also breaks at U+2028 and others, which JSON allows inside a
    # string
    lines = enumerate(data.text.split("\n"), start=1)
    return [
        Row(f"{data.path}:{number}", number, _json(f"{data.path}:{number}", line))
        for number, line in lines
        if line.strip()
    ]


def _listed(data: DataFile) -> list[Row]:
    rows = enumerate(_json(str(data.path), data.text), start=1)
    return [Row(f"{data.path}: row {number}", number, row) for number, row in rows]


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluatorError(f"{where}: not JSON ({error})", _HOW) from None

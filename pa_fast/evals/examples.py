"""Labelled examples: what a row of an ICL data file means."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import EvaluatorError
from pa_fast.evals.files import DataFile

QUESTION = ("question", "input", "query", "text")
CHOICES = ("choices", "options", "endings")
ANSWER = ("answer", "label", "gold", "target")
POOL = "pool"
FIELDS = ("prompt", "id", "group", "split", *QUESTION, *CHOICES, *ANSWER)


@dataclass(frozen=True)
class Example:
    """One row. Shown as a shot it reads `context + answer`; a scored one offers `context + choice` for each choice.

    `lead` is what stands before every answer (one space in the `Question: …` form), and counts in no length.
    """

    where: str
    id: str
    group: str
    context: str
    lead: str
    choices: tuple[str, ...]
    answer: str
    in_pool: bool

    @property
    def shown(self) -> str:
        return self.context + self.lead + self.answer


def read_examples(data: DataFile, group: str) -> list[Example]:
    """The examples of a `.jsonl` file, in file order; ids are unique, rows without `group` belong to the one given.

    Raises:
        EvaluatorError: a row lacks a field, its answer is not among its choices, or an id repeats.
    """
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for line, row in data.rows():
        example = _example(f"{data.path}:{line}", row, str(line), group)
        if example.id in seen:
            raise EvaluatorError(
                f"{example.where}: id `{example.id}` was already used at {seen[example.id]}", "ids must be unique"
            )
        seen[example.id] = example.where
        examples.append(example)
    return examples


def _example(where: str, row: Mapping[str, Any], id: str, group: str) -> Example:
    for name in row.keys() - set(FIELDS):
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.75)
        if near and near[0] not in row:
            raise EvaluatorError(f"{where}: there is no field `{name}`", f"did you mean {near[0]}?")
    if "prompt" in row and any(name in row for name in QUESTION):
        raise EvaluatorError(f"{where}: found both a prompt and a question", "a prompt is taken as it is; keep one of the two")
    if "prompt" in row:
        context, lead = _text(where, row, "prompt"), ""
    else:
        context, lead = f"Question: {_text(where, row, _field(where, row, QUESTION, or_else='prompt'))}\nAnswer:", " "
    choices: tuple[str, ...] = ()
    if any(name in row for name in CHOICES):
        field = _field(where, row, CHOICES)
        listed = row[field]
        if not isinstance(listed, list) or not listed or not all(isinstance(choice, str) and choice for choice in listed):
            raise EvaluatorError(f"{where}: `{field}` is {listed!r}, expected a list of texts", "write every choice as a text")
        choices = tuple(listed)
        if len(set(choices)) < 2:
            raise EvaluatorError(
                f"{where}: `{field}` is {listed!r}, expected two or more different texts", "list each choice once"
            )
    return Example(
        where=where,
        id=str(row.get("id", id)),
        group=str(row.get("group", group)),
        context=context,
        lead=lead,
        choices=choices,
        answer=_answer(where, row, choices),
        in_pool=row.get("split") == POOL,
    )


def _answer(where: str, row: Mapping[str, Any], choices: tuple[str, ...]) -> str:
    answer = row[_field(where, row, ANSWER)]
    if isinstance(answer, str) and answer and (not choices or answer in choices):
        return answer
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    expected = f"one of {list(choices)} or an index from 0 to {len(choices) - 1}" if choices else "a text"
    raise EvaluatorError(f"{where}: answer {answer!r} is not among the choices, expected {expected}", "name the right choice")


def _field(where: str, row: Mapping[str, Any], names: tuple[str, ...], or_else: str = "") -> str:
    for name in names:
        if name in row:
            return name
    wanted = " or ".join(f"`{name}`" for name in ([or_else] if or_else else []) + [names[0]])
    raise EvaluatorError(
        f"{where}: found the fields {sorted(row)}, expected {wanted}", "see the icl example of `pa-fast sweep --help`"
    )


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str) or not row[field].strip():
        raise EvaluatorError(f"{where}: `{field}` is {row[field]!r}, expected a text", "every row needs one")
    return str(row[field])

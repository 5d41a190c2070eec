"""Labelled examples: what a row of an ICL data file means."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

from pa_fast.errors import EvaluatorError
from pa_fast.evals.files import DataFile
from pa_fast.evals.matching import answers
from pa_fast.evals.overflow import each
from pa_fast.evals.rows import Row, distinct, read_rows

QUESTION = ("question", "input", "query", "text")
CHOICES = ("choices", "options", "endings")
ANSWER = ("answer", "label", "gold", "target")
POOL = "pool"
FIELDS = ("prompt", "id", "group", "split", *QUESTION, *CHOICES, *ANSWER)
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Example:
    """One row. Shown as a shot it reads `context + lead + answer`; a scored one offers `context +
    lead + choice` for each.

    `question` is what it asks, without options; `lead` stands before every answer (one space in the
    `Question: …` form) and counts in no length; `answers` are the right ones, of which the first is
    shown.
    """

    where: str
    id: str
    group: str
    question: str
    context: str
    lead: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    in_pool: bool

    @property
    def answer(self) -> str:
        return self.answers[0]

    @property
    def shown(self) -> str:
        return self.context + self.lead + self.answer

    def lettered(self) -> Example:
        """The same question with its choices listed as `A. …`, to be answered with a letter.

        Raises:
            EvaluatorError: no choices, more than 26, or one that is listed twice.
        """
        if not self.choices:
            raise EvaluatorError(
                f"{self.where}: found no choices; mode=letter lists choices",
                "give the row `choices`",
            )
        if len(self.choices) > len(LETTERS):
            raise EvaluatorError(
                f"{self.where}: {len(self.choices)} choices for {len(LETTERS)} letters",
                "use mode=cloze",
            )
        if len(set(self.choices)) < len(self.choices):
            raise EvaluatorError(
                f"{self.where}: a choice is listed under two letters", "list each choice once"
            )
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices))
        return replace(
            self,
            context=f"{self.question.rstrip()}{listed}\nAnswer:",
            lead=" ",
            choices=tuple(LETTERS[: len(self.choices)]),
            answers=(LETTERS[self.choices.index(self.answer)],),
        )


def read_examples(data: DataFile, group: str) -> list[Example]:
    """The examples of a data file, in its order; ids are unique, rows without `group` belong to the
    one given.

    Raises:
        EvaluatorError: a row lacks a field, its answer is not among its choices, or an id repeats.
    """
    rows = read_rows(data)
    examples = each(rows, lambda row: _example(row, group), "rows")
    distinct(rows)
    return examples


def _example(row: Row, group: str) -> Example:
    row.refuse_misspelt(FIELDS)
    if "prompt" in row.fields and any(name in row.fields for name in QUESTION):
        raise EvaluatorError(
            f"{row.where}: found both a prompt and a question",
            "a prompt is taken as it is; keep one of the two",
        )
    if "prompt" in row.fields:
        question = context = row.text("prompt")
        lead = ""
    else:
        question = f"Question: {row.text(_field(row, QUESTION, or_else='prompt'))}"
        context, lead = f"{question}\nAnswer:", " "
    choices = _choices(row)
    return Example(
        where=row.where,
        id=row.id,
        group=row.label("group", group),
        question=question,
        context=context,
        lead=lead,
        choices=choices,
        answers=_answers(row, choices),
        in_pool=row.fields.get("split") == POOL,
    )


def _choices(row: Row) -> tuple[str, ...]:
    if not any(name in row.fields for name in CHOICES):
        return ()
    field = _field(row, CHOICES)
    listed = row.fields[field]
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(choice, str) and choice for choice in listed)
    ):
        raise EvaluatorError(
            f"{row.where}: `{field}` is {listed!r}, expected a list of texts",
            "write every choice as a text",
        )
    if len(set(listed)) < 2:
        raise EvaluatorError(
            f"{row.where}: `{field}` is {listed!r}, expected two or more different texts",
            "list each choice once",
        )
    return tuple(listed)


def _answers(row: Row, choices: tuple[str, ...]) -> tuple[str, ...]:
    field = _field(row, ANSWER)
    answer = row.fields[field]
    if not choices:
        return answers(row, field)
    if isinstance(answer, str) and answer in choices:
        return (answer,)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return (choices[answer],)
    raise EvaluatorError(
        f"{row.where}: answer {answer!r} is not among the choices, expected one of {list(choices)}"
        f" or an index from 0 to {len(choices) - 1}",
        "name the right choice",
    )


def _field(row: Row, names: tuple[str, ...], or_else: str = "") -> str:
    for name in names:
        if name in row.fields:
            return name
    wanted = " or ".join(f"`{name}`" for name in ([or_else] if or_else else []) + [names[0]])
    raise EvaluatorError(
        f"{row.where}: found the fields {sorted(row.fields)}, expected {wanted}",
        "see the icl example of `pa-fast sweep --help`",
    )

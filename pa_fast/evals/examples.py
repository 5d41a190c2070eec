"""Labelled examples: the rows of an ICL data file, and the shots before each."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pa_fast.errors import EvaluatorError
from pa_fast.evals.prompts import each
from pa_fast.evals.rows import DataFile, DataRow, answers, check_distinct, limited, read_rows

QUESTION = ("question", "input", "query", "text")
CHOICES = ("choices", "options", "endings")
ANSWER = ("answer", "label", "gold", "target")
POOL = "pool"
FIELDS = ("prompt", "id", "group", "split", *QUESTION, *CHOICES, *ANSWER)
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Example:
    """One row. As a shot it is `context + lead + answer`; as a scored item `context + lead +
    choice` for each choice.

    `question` is the question without options; `lead` precedes every answer (one space in the
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
        """Return the same question with its choices listed as `A. …`, to be answered with a letter.

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
    """Return the examples of a data file, in its order, with unique ids; rows without `group` are
    of the given one.

    Raises:
        EvaluatorError: a row lacks a field, its answer is not among its choices, or an id repeats.
    """
    rows = read_rows(data)
    examples = each(rows, lambda row: _example(row, group), "rows")
    check_distinct(rows)
    return examples


def _example(row: DataRow, group: str) -> Example:
    row.check_spelling(FIELDS)
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


def _choices(row: DataRow) -> tuple[str, ...]:
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


def _answers(row: DataRow, choices: tuple[str, ...]) -> tuple[str, ...]:
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


def _field(row: DataRow, names: tuple[str, ...], or_else: str = "") -> str:
    for name in names:
        if name in row.fields:
            return name
    wanted = " or ".join(f"`{name}`" for name in ([or_else] if or_else else []) + [names[0]])
    raise EvaluatorError(
        f"{row.where}: found the fields {sorted(row.fields)}, expected {wanted}",
        "see the icl example of `pa-fast sweep --help`",
    )


# --- shots


@dataclass(frozen=True)
class ShownItem:
    """One item as the model sees it: its shots, each with the separator behind it, and its own
    context."""

    shots: tuple[str, ...]
    context: str

    def text(self, dropped: int = 0) -> str:
        """Return the prompt, without the first `dropped` shots."""
        return "".join(self.shots[dropped:]) + self.context


@dataclass(frozen=True)
class Shots:
    """Options of the shots before each item. They are chosen once, the same at every λ.

    Attributes:
        count: examples before each item.
        sep: the text behind every shot.
        pool: a second file to draw shots from; without it rows marked `"split": "pool"`, or without
            those a seeded part of each group, which is then not scored.
        seed: draws the shots of each item, together with the item's id.
    """

    count: int
    sep: str
    pool: DataFile | None
    seed: int

    def ask(
        self,
        data: DataFile,
        limit: int | None,
        form: Callable[[Example], Example] = lambda example: example,
    ) -> tuple[list[Example], list[ShownItem], list[str]]:
        """Return at most `limit` items to score, each with its prompt, and notes on rows that are
        not scored.

        Args:
            form: rewrites items and shots alike.

        Raises:
            EvaluatorError: a row is wrong, or a group's pool is smaller than `count`.
        """
        scored, shown, notes = self._divide(data)
        pools: dict[str, list[Example]] = {}
        for example in map(form, shown):
            pools.setdefault(example.group, []).append(example)
        scored = limited(scored, [example.group for example in scored], limit, self.seed)
        items = each(scored, form, "rows")
        return items, each(items, lambda item: self._shown_item(item, pools), "rows"), notes

    def _divide(self, data: DataFile) -> tuple[list[Example], list[Example], list[str]]:
        """Return the examples to score, the others to show, and notes on rows of the file that are
        therefore not scored."""
        examples, why = read_examples(data, data.path.stem), "marked as pool"
        marked = [example for example in examples if example.in_pool]
        if self.pool is not None and marked:
            raise EvaluatorError(
                f"{marked[0].where} is marked as pool, and pool={self.pool.path} was given too",
                "keep one of the two pools",
            )
        if self.pool is not None:
            marked = read_examples(self.pool, data.path.stem)
        elif not marked and self.count > 0:
            marked, why = self._own_pool(examples), "drawn from each group"
        shown = {id(example) for example in marked}
        scored = [example for example in examples if id(example) not in shown]
        if not scored:
            raise EvaluatorError(
                f"{data.path}: all {len(examples)} rows are in the pool of shots, expected rows to"
                " score",
                "add rows",
            )
        held = len(examples) - len(scored)
        notes = (
            [f"{held} of {len(examples)} rows are held out for shots ({why}) and not scored"]
            if held
            else []
        )
        return scored, marked, notes

    def _own_pool(self, examples: Sequence[Example]) -> list[Example]:
        """Return a pool drawn from the rows themselves: a fifth of each group, at least `count`."""
        groups: dict[str, list[Example]] = {}
        for example in examples:
            groups.setdefault(example.group, []).append(example)
        sampled = []
        for group, members in groups.items():
            size = max(self.count, len(members) // 5)
            if size >= len(members):
                raise EvaluatorError(
                    f"{members[0].where}: group `{group}` has {len(members)} rows, expected more"
                    f" than {size}: {self.count} to show, and some to score",
                    'add rows, mark some as `"split": "pool"`, give pool=FILE, or take fewer shots',
                )
            sampled += random.Random(f"{self.seed}:{group}:pool").sample(members, size)
        return sampled

    def _shown_item(self, item: Example, pools: Mapping[str, Sequence[Example]]) -> ShownItem:
        """Return the item after `count` examples of its group, none of them with the same
        question."""
        pool = [
            example for example in pools.get(item.group, []) if example.question != item.question
        ]
        if len(pool) < self.count:
            raise EvaluatorError(
                f"{item.where}: the pool has {len(pool)} examples of group `{item.group}`, expected"
                f" at least shots={self.count}",
                "add examples of that group to the pool, or take fewer shots",
            )
        sampled = random.Random(f"{self.seed}:{item.id}").sample(pool, self.count)
        return ShownItem(tuple(example.shown + self.sep for example in sampled), item.context)

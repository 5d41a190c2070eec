"""Shots: which examples are shown before which, drawn once for all λ."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pa_fast.errors import EvaluatorError
from pa_fast.evals.examples import Example, read_examples
from pa_fast.evals.files import DataFile, limited
from pa_fast.evals.overflow import each


@dataclass(frozen=True)
class Asked:
    """How one item is asked: its shots, each with what separates it from the next, and its own
    context."""

    shots: tuple[str, ...]
    context: str

    def text(self, dropped: int = 0) -> str:
        """The prompt, without the first `dropped` shots."""
        return "".join(self.shots[dropped:]) + self.context


@dataclass(frozen=True)
class Shots:
    """How items are asked.

    Attributes:
        count: examples before each item.
        sep: stands after every shot.
        pool: a second file to draw shots from; without it rows marked `"split": "pool"`, or without
            those a seeded part of each group, which is then not scored.
        seed: draws the shots, each item's from its own id: an item is asked in the same words at
            every λ.
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
    ) -> tuple[list[Example], list[Asked], list[str]]:
        """The items to score and how each is asked, at most `limit`; `form` rewrites items and
        shots alike. And notes of the rows that are not scored.

        Raises:
            EvaluatorError: a row is wrong, or a group's pool is smaller than `count`.
        """
        scored, shown, notes = self._divide(data)
        pools: dict[str, list[Example]] = {}
        for example in map(form, shown):
            pools.setdefault(example.group, []).append(example)
        scored = limited(scored, [example.group for example in scored], limit, self.seed)
        items = each(scored, form, "rows")
        return items, each(items, lambda item: self._asked(item, pools), "rows"), notes

    def _divide(self, data: DataFile) -> tuple[list[Example], list[Example], list[str]]:
        """The examples to score, and those to show; none is both. And notes of those that the file
        loses by it."""
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
            marked, why = self._drawn(examples), "drawn from each group"
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

    def _drawn(self, examples: Sequence[Example]) -> list[Example]:
        """A pool from the rows themselves: of each group a fifth, and no fewer than `count`."""
        groups: dict[str, list[Example]] = {}
        for example in examples:
            groups.setdefault(example.group, []).append(example)
        drawn = []
        for group, members in groups.items():
            size = max(self.count, len(members) // 5)
            if size >= len(members):
                raise EvaluatorError(
                    f"{members[0].where}: group `{group}` has {len(members)} rows, expected more"
                    f" than {size}: {self.count} to show, and some to score",
                    'add rows, mark some as `"split": "pool"`, give pool=FILE, or take fewer shots',
                )
            drawn += random.Random(f"{self.seed}:{group}:pool").sample(members, size)
        return drawn

    def _asked(self, item: Example, pools: Mapping[str, Sequence[Example]]) -> Asked:
        """`count` examples of the item's group and then its context. An example that asks the same
        is never shown."""
        pool = [
            example for example in pools.get(item.group, []) if example.question != item.question
        ]
        if len(pool) < self.count:
            raise EvaluatorError(
                f"{item.where}: the pool has {len(pool)} examples of group `{item.group}`, expected"
                f" at least shots={self.count}",
                "add examples of that group to the pool, or take fewer shots",
            )
        drawn = random.Random(f"{self.seed}:{item.id}").sample(pool, self.count)
        return Asked(tuple(example.shown + self.sep for example in drawn), item.context)

"""In-context learning: labelled examples, each asked after k others of its group."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from pa_fast.base import Engine, Item, Score, Tokenizer
from pa_fast.errors import EvaluatorError
from pa_fast.evals.examples import Example, read_examples
from pa_fast.evals.files import DataFile, limited
from pa_fast.evals.likelihood import Pair, Prepared, logprobs, pairs_of


class Icl:
    """Cloze accuracy: the choice whose text is likeliest per character is the model's answer.

    The first of equally likely choices wins. Shots are drawn once, from the item's id and the seed, so an item is
    asked in the same words at every λ.

    Args:
        data: labelled examples (`examples.py` has the fields).
        pool: a second file to draw shots from; without it rows marked `"split": "pool"`, or without those a seeded
            part of each group, which is then not scored.
        shots: examples before each item.
        sep: stands after every shot.
        norm: `character` divides each log-likelihood by the length of the answer text, as lm-eval's `acc_norm`;
            `none` takes it as it is, as `acc`.

    Raises:
        EvaluatorError: a row is wrong, has no choices, or a group's pool is smaller than `shots`.
    """

    higher_is_better = True

    def __init__(
        self, name: str, data: DataFile, *, pool: DataFile | None, shots: int, sep: str, norm: str, limit: int | None, seed: int
    ):
        self.name = name
        self.norm = norm
        scored, pools = _divide(data, pool, shots, seed)
        self.items = limited(scored, limit, seed)
        self.prompts = [_prompt(item, pools, shots, sep, seed) for item in self.items]
        self.identity: Mapping[str, Any] = {
            "evaluator": "icl",
            "mode": "cloze",
            "shots": shots,
            "sep": sep,
            "norm": norm,
            "limit": limit,
            "seed": seed,
            "sha256": data.sha256,
            "pool_sha256": None if pool is None else pool.sha256,
        }
        self._prepared = Prepared(self._pairs)

    def __call__(self, engine: Engine) -> Score:
        pairs, owners = self._prepared(engine.tokenizer)
        values = iter(logprobs(engine, pairs, lambda i: f"item {owners[i]}"))
        items = []
        for item in self.items:
            lengths = [len(choice) if self.norm == "character" else 1 for choice in item.choices]
            weighed = [next(values) / length for length in lengths]
            answer = item.choices[weighed.index(max(weighed))]
            items.append(Item(item.id, item.group, float(answer == item.answer)))
        unit = "accuracy (per character)" if self.norm == "character" else "accuracy"
        return Score(sum(item.score for item in items) / len(items), unit, len(items), items)

    def _pairs(self, tokenizer: Tokenizer) -> tuple[list[Pair], list[str]]:
        pairs: list[Pair] = []
        owners: list[str] = []
        for item, prompt in zip(self.items, self.prompts):
            pairs += pairs_of(tokenizer, prompt, [item.lead + choice for choice in item.choices])
            owners += [item.id] * len(item.choices)
        return pairs, owners


def _divide(data: DataFile, pool: DataFile | None, shots: int, seed: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """The examples to score, and by group those to show; none is both."""
    examples = read_examples(data, data.path.stem)
    marked = [example for example in examples if example.in_pool]
    if pool is not None and marked:
        raise EvaluatorError(
            f"{marked[0].where} is marked as pool, and pool={pool.path} was given too", "keep one of the two pools"
        )
    if pool is not None:
        marked = read_examples(pool, data.path.stem)
    elif not marked and shots > 0:
        marked = _drawn(examples, shots, seed)
    shown = {id(example) for example in marked}
    scored = [example for example in examples if id(example) not in shown]
    if not scored:
        raise EvaluatorError(
            f"{data.path}: all {len(examples)} rows are in the pool of shots, expected rows to score", "add rows"
        )
    for example in scored:
        if not example.choices:
            raise EvaluatorError(f"{example.where}: found no choices; mode=cloze scores choices", "give the row `choices`")
    pools: dict[str, list[Example]] = {}
    for example in marked:
        pools.setdefault(example.group, []).append(example)
    return scored, pools


def _drawn(examples: list[Example], shots: int, seed: int) -> list[Example]:
    """A pool from the rows themselves: of each group a fifth, and no fewer than `shots`."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    drawn = []
    for group, members in groups.items():
        size = max(shots, len(members) // 5)
        if size >= len(members):
            raise EvaluatorError(
                f"{members[0].where}: group `{group}` has {len(members)} rows, expected more than {size}: "
                f"{shots} to show, and some to score",
                'add rows, mark some as `"split": "pool"`, give pool=FILE, or take fewer shots',
            )
        drawn += random.Random(f"{seed}:{group}:pool").sample(members, size)
    return drawn


def _prompt(item: Example, pools: Mapping[str, list[Example]], shots: int, sep: str, seed: int) -> str:
    """`shots` examples of the item's group and then its context. An example that asks the same is never shown."""
    pool = [example for example in pools.get(item.group, []) if example.context != item.context]
    if len(pool) < shots:
        raise EvaluatorError(
            f"{item.where}: the pool has {len(pool)} examples of group `{item.group}`, expected at least shots={shots}",
            "add examples of that group to the pool, or take fewer shots",
        )
    drawn = random.Random(f"{seed}:{item.id}").sample(pool, shots)
    return "".join(example.shown + sep for example in drawn) + item.context

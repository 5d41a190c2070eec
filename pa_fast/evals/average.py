"""The one value of many items: each group counts the same, or each item does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pa_fast.base import Item

AVERAGES = ("macro", "micro")
"""`macro`: the mean over groups of each one's mean. `micro`: the mean over items."""


def averaged(items: Sequence[Item], kind: str) -> float:
    """The mean score of `items`, by `kind`."""
    if kind == "micro":
        return sum(item.score for item in items) / len(items)
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item.score)
    return sum(sum(scores) / len(scores) for scores in groups.values()) / len(groups)


def weighted(items: Sequence[Item], kind: str) -> list[Item]:
    """`items` with what each counts in their average by `kind`: 1 where all count the same."""
    sizes = Counter(item.group for item in items)
    if kind == "micro" or len(set(sizes.values())) == 1:
        return list(items)
    mean = len(items) / len(sizes)
    return [replace(item, weight=mean / sizes[item.group]) for item in items]


def labelled(unit: str, groups: Iterable[str], kind: str) -> str:
    """`unit` with how groups were averaged, where there are several."""
    return f"{unit}, {kind}" if len(set(groups)) > 1 else unit

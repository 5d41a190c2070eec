"""The one value of many items: each group counts the same, or each item does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def labelled(unit: str, groups: Iterable[str], kind: str) -> str:
    """`unit` with how groups were averaged, where there are several."""
    return f"{unit}, {kind}" if len(set(groups)) > 1 else unit

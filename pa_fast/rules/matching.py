"""Decide which row of a λ rule gives each tensor of a model its λ. Rows that match or decide
nothing are refused."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Sequence
from fractions import Fraction

from pa_fast.errors import UsageError
from pa_fast.rules.names import GROUPS, group, layer
from pa_fast.rules.row import RuleRow


@functools.lru_cache(maxsize=8)
def decided(
    where: str, rows: tuple[RuleRow, ...], names: tuple[str, ...]
) -> tuple[tuple[int, Fraction], ...]:
    """Return for each name the index of the row that decides it, −1 for none, and the depth at
    which the row's value is taken."""
    last_layer: dict[str, int] = {}
    layers = [layer(name) for name in names]
    for position in layers:
        if position is not None:
            last_layer[position[0]] = max(last_layer.get(position[0], 0), position[1])
    groups = [group(name) for name in names]
    undecided = set(range(len(names)))
    decisions: list[tuple[int, Fraction]] = [(-1, Fraction(0))] * len(names)
    for index, row in enumerate(rows):
        here = f"{where}: row {index + 1} ({row})"
        mine = _matched(here, row, names, groups)
        if not undecided & mine:
            raise UsageError(
                f"{here} decides nothing: rows before it match all {len(mine)} of its tensors",
                "move it up",
            )
        for t in sorted(undecided & mine):
            position = layers[t]
            if row.is_schedule and position is None:
                raise UsageError(
                    f"{here} is a schedule over the layers, and `{names[t]}` has no layer number",
                    "put a row for that tensor before it, or narrow the match, such as to"
                    " *.layers.*",
                )
            depth = (
                Fraction(position[1], last_layer[position[0]])
                if row.is_schedule and position is not None and last_layer[position[0]]
                else Fraction(0)
            )
            decisions[t] = (index, depth)
        undecided -= mine
    return tuple(decisions)


def _matched(
    here: str, row: RuleRow, names: Sequence[str], groups: Sequence[str | None]
) -> set[int]:
    """Return the indices of the names that the row matches."""
    matched = set(range(len(names)))
    if row.match:
        fitting = []
        for pattern in row.match:
            fits = re.compile(fnmatch.translate(pattern)).match
            fitting.append({t for t, name in enumerate(names) if fits(name)})
            if not fitting[-1]:
                raise UsageError(
                    f"{here}: no tensor has a name like `{pattern}`", _meant(pattern, names)
                )
        matched = set().union(*fitting)
    if row.group is not None:
        matched &= {t for t, known in enumerate(groups) if known == row.group}
        if not matched:
            counted = {known: groups.count(known) for known in GROUPS if known in groups}
            counts = ", ".join(f"{known} {count}" for known, count in counted.items()) or "none"
            mismatch = f"no tensor of group `{row.group}`" + (
                " has such a name" if row.match else ""
            )
            raise UsageError(f"{here}: {mismatch}", f"tensors by group: {counts}; or match by name")
    return matched


def _meant(pattern: str, names: Sequence[str]) -> str:
    """Return a hint with the names that a pattern without a match may mean, one for all layers."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.4)
    for kind in kinds if len(near) < 3 else ():
        if (
            any(part.strip("*?") and part.strip("*?") in kind for part in pattern.split("."))
            and kind not in near
        ):
            near.append(kind)
    return (
        "a pattern fits a whole name, and a rule is asked with all names of a model; among these"
        f" {len(names)}: {', '.join(f'`{name}`' for name in (near or kinds)[:3])}"
    )

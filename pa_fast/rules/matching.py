"""Which row of a λ rule decides each tensor of a model; rows that match or decide nothing are
refused."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Sequence
from fractions import Fraction

from pa_fast.errors import UsageError
from pa_fast.rules.names import GROUPS, group, layer
from pa_fast.rules.row import Row


@functools.lru_cache(maxsize=8)
def decided(
    where: str, rows: tuple[Row, ...], names: tuple[str, ...]
) -> tuple[tuple[int, Fraction], ...]:
    """For each name the place of the row that decides it, −1 for none, and the depth at which its
    value is taken."""
    last: dict[str, int] = {}
    places = [layer(name) for name in names]
    for place in places:
        if place is not None:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    groups = [group(name) for name in names]
    left = set(range(len(names)))
    found: list[tuple[int, Fraction]] = [(-1, Fraction(0))] * len(names)
    for at, row in enumerate(rows):
        here = f"{where}: row {at + 1} ({row})"
        mine = _matched(here, row, names, groups)
        if not left & mine:
            raise UsageError(
                f"{here} decides nothing: rows before it match all {len(mine)} of its tensors",
                "move it up",
            )
        for t in sorted(left & mine):
            place = places[t]
            if row.by_depth and place is None:
                raise UsageError(
                    f"{here} is a schedule over the layers, and `{names[t]}` has no layer number",
                    "put a row for that tensor before it, or narrow the match, such as to"
                    " *.layers.*",
                )
            depth = (
                Fraction(place[1], last[place[0]])
                if row.by_depth and place is not None and last[place[0]]
                else Fraction(0)
            )
            found[t] = (at, depth)
        left -= mine
    return tuple(found)


def _matched(here: str, row: Row, names: Sequence[str], groups: Sequence[str | None]) -> set[int]:
    """Places of the names that the row matches."""
    mine = set(range(len(names)))
    if row.match:
        fitting = []
        for pattern in row.match:
            fits = re.compile(fnmatch.translate(pattern)).match
            fitting.append({t for t, name in enumerate(names) if fits(name)})
            if not fitting[-1]:
                raise UsageError(
                    f"{here}: no tensor has a name like `{pattern}`", _meant(pattern, names)
                )
        mine = set().union(*fitting)
    if row.group is not None:
        mine &= {t for t, known in enumerate(groups) if known == row.group}
        if not mine:
            counted = {known: groups.count(known) for known in GROUPS if known in groups}
            found = ", ".join(f"{known} {count}" for known, count in counted.items()) or "none"
            what = f"no tensor of group `{row.group}`" + (" has such a name" if row.match else "")
            raise UsageError(f"{here}: {what}", f"tensors by group: {found}; or match by name")
    return mine


def _meant(pattern: str, names: Sequence[str]) -> str:
    """The names that a pattern which fits none could have meant, one for all layers."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.4)
    for kind in kinds if len(near) < 3 else ():
        if (
            any(part.strip("*?") and part.strip("*?") in kind for part in pattern.split("."))
            and kind not in near
        ):
            near.append(kind)
    return (
        "a pattern fits a whole name; the model has"
        f" {', '.join(f'`{name}`' for name in (near or kinds)[:3])}"
    )

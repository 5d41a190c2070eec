"""One row of a λ rule: which tensors it is for, and their value."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.rules.names import GROUPS

KEYS = ("match", "group", "lambda", "times")
EXAMPLE = "{group: mlp, times: 0.5}"

Points = tuple[tuple[Fraction, Fraction], ...]


@dataclass(frozen=True)
class RuleRow:
    """One row of a rule.

    Attributes:
        match: shell patterns (`*`, `?`, `[…]`), of which one must fit the whole name; none fits any
            name.
        group: one of GROUPS, or None.
        times: whether the value is a multiplier of the swept λ, instead of λ itself.
        points: (depth, value) by rising depth, linear in between and constant outside; one point is
            one value for all.
    """

    match: tuple[str, ...]
    group: str | None
    times: bool
    points: Points

    @property
    def is_schedule(self) -> bool:
        """True if the value depends on the layer."""
        return len(self.points) > 1

    def value(self, depth: Fraction) -> Fraction:
        """Return the value at a depth from 0, the first layer, to 1, the last."""
        below = [point for point in self.points if point[0] <= depth]
        above = [point for point in self.points if point[0] > depth]
        if not below or not above:
            return (below[-1] if below else above[0])[1]
        (x0, y0), (x1, y1) = below[-1], above[0]
        return y0 + (y1 - y0) * (depth - x0) / (x1 - x0)

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values, numbers as exact texts."""
        document: dict[str, Any] = {}
        if self.match:
            document["match"] = self.match[0] if len(self.match) == 1 else list(self.match)
        if self.group:
            document["group"] = self.group
        spelled = {Lambda(depth).key: Lambda(value).key for depth, value in self.points}
        document["times" if self.times else "lambda"] = (
            spelled if self.is_schedule else spelled[Lambda(self.points[0][0]).key]
        )
        return document

    def __str__(self) -> str:
        return ", ".join(
            f"{key}: {json.dumps(value, ensure_ascii=False) if key != 'group' else value}"
            for key, value in self.document().items()
        )


def parse(here: str, row: Any) -> RuleRow:
    if not isinstance(row, Mapping):
        raise UsageError(
            f"{here}: found {shown(row)}, expected a mapping", f"for example {EXAMPLE}"
        )
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            meant = f"did you mean `{near[0]}`? " if near else ""
            raise UsageError(
                f"{here}: unknown key `{reprlib.repr(key)[1:-1]}`",
                f"{meant}the keys are {', '.join(KEYS)}",
            )
    if ("lambda" in row) == ("times" in row):
        actual = "both `lambda` and `times`" if "lambda" in row else "neither `lambda` nor `times`"
        raise UsageError(
            f"{here}: found {actual}, expected one of them",
            "lambda: λ itself; times: a multiplier of the swept λ",
        )
    if "match" not in row and "group" not in row:
        raise UsageError(
            f"{here}: found neither `match` nor `group`",
            'say which tensors; match: "*" is all of them',
        )
    match = row.get("match", [])
    patterns = [match] if isinstance(match, str) else match
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(one, str) and one for one in patterns
    ):
        raise UsageError(
            f"{here}: `match` is {shown(match)}, expected a pattern or a list of them",
            f"for example {EXAMPLE}",
        )
    if "match" in row and not patterns:
        raise UsageError(
            f"{here}: `match` is an empty list, expected patterns", f"for example {EXAMPLE}"
        )
    known = row.get("group")
    if "group" in row and (not isinstance(known, str) or known not in GROUPS):
        raise UsageError(
            f"{here}: `group` is {shown(known)}, expected {', '.join(GROUPS)}", "or match by name"
        )
    times = "times" in row
    key = "times" if times else "lambda"
    return RuleRow(tuple(patterns), known, times, _points(f"{here}: `{key}`", row[key]))


def _points(here: str, value: Any) -> Points:
    if not isinstance(value, Mapping):
        return ((Fraction(0), _number(here, value)),)
    points = sorted(
        (_number(f"{here}, depth", depth), _number(here, one)) for depth, one in value.items()
    )
    if len(points) < 2:
        raise UsageError(
            f"{here}: a schedule of {len(points)} points, expected two or more",
            "such as {0: 0.2, 1: 1}",
        )
    depths = [depth for depth, _ in points]
    if len(set(depths)) < len(depths) or not 0 <= depths[0] <= depths[-1] <= 1:
        listed = ", ".join(Lambda(depth).key for depth in depths)
        raise UsageError(
            f"{here}: depths {listed}, expected different ones from 0 to 1",
            "0 is the first layer, 1 the last",
        )
    return tuple(points)


def _number(here: str, value: Any) -> Fraction:
    if isinstance(value, (str, int, float, Fraction)) and not isinstance(value, bool):
        try:
            return Lambda(value).exact
        except UsageError:
            pass
    raise UsageError(
        f"{here} is {shown(value)}, expected a number",
        "write a decimal or a fraction, such as 0.6 or 1/3",
    )


def shown(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return f"`{reprlib.repr(value)}`" if not isinstance(value, str) else reprlib.repr(value)
    return "nothing" if value is None else f"a {type(value).__name__}"

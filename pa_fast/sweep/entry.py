"""Entries of the journal: one attempt at one point, on one line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pa_fast.base import Lambda
from pa_fast.errors import UsageError


@dataclass(frozen=True)
class JournalEntry:
    """One attempt to evaluate `evaluator` at λ: a score with its unit and number of items, or an
    error.

    `lam` is the exact key of λ; `items` names the file of item scores, `outputs` the folder of the
    evaluator's own files, relative to the run folder; `details` are its further figures; `checksum`
    is that of the live weights after the switch, None where the switch itself failed;
    `intended_lambda` is what `effective_lambda` would be without rounding, where a rule gives
    tensors different λ; `restored` are the kinds of process state that the evaluator changed and
    that were put back, such as `autocast`; times are wall seconds.
    """

    lam: str
    evaluator: str
    score: float | None = None
    unit: str | None = None
    n: int | None = None
    details: dict[str, float] | None = None
    items: str | None = None
    outputs: str | None = None
    error: str | None = None
    traceback: str | None = None
    checksum: int | None = None
    effective_lambda: float | None = None
    intended_lambda: float | None = None
    switch_s: float | None = None
    eval_s: float | None = None
    host: str | None = None
    restored: tuple[str, ...] | None = None

    @property
    def finished(self) -> bool:
        """True if the point has its score and need not run again."""
        return self.error is None

    def line(self) -> bytes:
        """Return the entry as one line of JSON with its newline; `lam` is called `lambda`, and the
        checksum is hexadecimal."""
        fields = {_name(key): value for key, value in vars(self).items() if value is not None}
        if self.checksum is not None:
            # some readers of JSON hold every number as a double, which loses bits of 64
            fields["checksum"] = f"{self.checksum:016x}"
        return json.dumps(fields, allow_nan=False).encode() + b"\n"


_TEXTS = ("unit", "items", "outputs", "error", "traceback", "host")
_NUMBERS = ("score", "effective_lambda", "intended_lambda", "switch_s", "eval_s")


def parse(line: bytes) -> JournalEntry:
    """Return the entry that `line` holds. Unknown fields, of a later version, are ignored.

    Raises:
        ValueError: not an entry; the message says why.
    """
    try:
        fields = json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")
    values: dict[str, Any] = {
        name: _field(fields, name) for name in (f.name for f in dataclasses.fields(JournalEntry))
    }
    entry = JournalEntry(**values)
    if entry.error is None and (entry.score is None or entry.unit is None or entry.n is None):
        raise ValueError("holds neither a score with unit and n nor an error")
    return entry


def _name(field: str) -> str:
    return "lambda" if field == "lam" else field


def _field(fields: dict[str, Any], name: str) -> Any:
    value = fields.get(_name(name))
    if name == "lam":
        return _key(value)
    if name == "evaluator":
        valid = isinstance(value, str) and value != "" and value.isprintable()
    elif value is None:
        return None
    elif name == "checksum":
        return int(_hexadecimal(value), 16)
    elif name in _TEXTS:
        valid = isinstance(value, str) and (name != "unit" or value.isprintable())
    elif name == "n":
        valid = type(value) is int and value > 0
    elif name == "details":
        valid = isinstance(value, dict) and all(map(_is_number, value.values()))
        value = {key: float(figure) for key, figure in value.items()} if valid else value
    elif name == "restored":
        valid = isinstance(value, list) and all(isinstance(kind, str) for kind in value)
        value = tuple(value) if valid else value
    else:
        assert name in _NUMBERS
        valid = _is_number(value)
        value = float(value) if valid else value
    if not valid:
        raise ValueError(f"has {_shown(value)} for `{_name(name)}`")
    return value


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (
        type(value) is float and math.isfinite(value)
    )


def _key(value: Any) -> str:
    # The length bounds the cost of the arithmetic: a damaged key may claim an exponent of any size
    if isinstance(value, str) and len(value) < 400 and set(value) <= set("-0123456789./"):
        try:
            if Lambda(value).key == value:
                return value
        except UsageError:
            pass
    raise ValueError(f"has {_shown(value)} for `lambda`, not the key of a λ")


def _hexadecimal(value: Any) -> str:
    if isinstance(value, str) and len(value) == 16 and set(value) <= set("0123456789abcdef"):
        return value
    raise ValueError(f"has {_shown(value)} for `checksum`, not 16 hexadecimal digits")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"


# --- shard

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `rank` (from 0) of a sweep in `world` parts: every `world`-th λ of the schedule.

    Raises:
        UsageError: `rank` is not below `world`.
    """

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"shard {self.rank}/{self.world} does not exist",
                f"shards count from 0 to {self.world - 1}",
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard of a text: `2/8` is the third of eight parts."""
        if not (match := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)):
            raise UsageError(
                f"shard `{text}` is not I/N",
                "write for example 0/4, 1/4, 2/4 and 3/4 for four processes",
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """The shard as file names spell it."""
        return f"{self.rank}-of-{self.world}"

    def of(self, points: Sequence[T]) -> list[T]:
        """Return this part of `points`; all parts together have each point once."""
        return list(points[self.rank :: self.world])

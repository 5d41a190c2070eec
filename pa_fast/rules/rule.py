"""LambdaRule: ordered rows, and the λ that they give to the names of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.rules import file
from pa_fast.rules.matching import decided
from pa_fast.rules.row import EXAMPLE, RuleRow, parse, shown


@dataclass(frozen=True)
class Touch:
    """The effect of one row of a rule: its text, the number of tensors that it decides, the first
    of them, and the range of their λ."""

    row: str
    tensors: int
    first: str
    lowest: str
    highest: str

    def __str__(self) -> str:
        counted = (
            f"{self.tensors} tensors such as `{self.first}`"
            if self.tensors > 1
            else f"`{self.first}`"
        )
        return f"rule ({self.row}): {counted}, λ = {self.lowest}" + (
            f" to {self.highest}" if self.highest != self.lowest else ""
        )


class LambdaRule:
    """A λ for each tensor, by its name. Immutable; equal rules at equal λ are equal.

    Args:
        rows: mappings with `match` (a shell pattern, or a list of them), `group` (norms,
            embeddings, attention, mlp), or both, and with `lambda` or `times`: a number or
            fraction, or a depth schedule {depth: value}. Depth is the first number in a name over
            the highest such number that any name of the same stack has: 0 is the first layer, 1 the
            last.
        lam: the swept λ: `times` multiplies it, and tensors that no row matches have it.
        where: source of the rows, for messages.

    Example:
        rows = [{"group": "norms", "lambda": 1}, {"group": "mlp", "times": {0: 0.2, 1: 1}}]
        lm.set_lambda(pa_fast.LambdaRule(rows).at(0.6))

    Numerics: exact rational arithmetic; each tensor's λ is rounded once, to fp32, when it is
    merged.

    Raises:
        UsageError: a row is not valid; the message names it and its key.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        lam: Lambda | float | str = 1,
        *,
        where: str = "rule",
    ):
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise UsageError(
                f"{where}: found {shown(rows)}, expected a list of rows", f"for example {EXAMPLE}"
            )
        self.where = where
        self.rows = tuple(
            row if isinstance(row, RuleRow) else parse(f"{where}: row {n}", row)
            for n, row in enumerate(rows, start=1)
        )
        self.lam = Lambda(lam)
        if not self.rows:
            raise UsageError(f"{where}: found no row", f"for example {EXAMPLE}")

    @classmethod
    def of(cls, rule: RuleLike) -> LambdaRule:
        """Return `rule` itself, or the rule of these rows or of the YAML file of that name."""
        if isinstance(rule, LambdaRule):
            return rule
        return cls.load(rule) if isinstance(rule, (str, Path)) else cls(rule)

    @classmethod
    def load(cls, path: str | Path) -> LambdaRule:
        """Read the rule in a YAML file: a list of rows.

        Raises:
            UsageError: the file cannot be read, is not YAML, or a row is not valid; the message
                names file, row and key.
        """
        return cls(file.read(path), where=str(path))

    def at(self, lam: Lambda | float | str) -> LambdaRule:
        """Return the same rule at another swept λ."""
        return LambdaRule(self.rows, lam, where=self.where)  # type: ignore[arg-type]

    def document(self) -> list[dict[str, Any]]:
        """Return the rows as plain JSON values, numbers as exact texts, which `LambdaRule` takes
        again."""
        return [row.document() for row in self.rows]

    def resolve(self, names: Iterable[str]) -> dict[str, Lambda]:
        """Return the λ of each of `names`, which are all tensors of a model that follow λ.

        Raises:
            UsageError: a row matches or decides nothing, or gives a depth schedule to a name
                without a layer number.
        """
        names = tuple(names)
        values: dict[tuple[int, Fraction], Lambda] = {}
        lams = {}
        for name, (index, depth) in zip(names, decided(self.where, self.rows, names)):
            if (index, depth) not in values:
                values[index, depth] = (
                    self.lam if index < 0 else self._value(self.rows[index], depth)
                )
            lams[name] = values[index, depth]
        return lams

    def touched(self, names: Iterable[str]) -> list[Touch]:
        """Return the effect of each row, and the tensors that keep the swept λ.

        Raises:
            UsageError: as for `resolve`.
        """
        names = tuple(names)
        lams = self.resolve(names)
        decided_by: dict[int, list[str]] = {}
        for name, (index, _) in zip(names, decided(self.where, self.rows, names)):
            decided_by.setdefault(index, []).append(name)
        rows = [(index, str(row)) for index, row in enumerate(self.rows)] + [(-1, "no row")]
        return [
            Touch(text, len(members), members[0], min(chosen).key, max(chosen).key)
            for index, text in rows
            if (members := decided_by.get(index)) and (chosen := [lams[name] for name in members])
        ]

    def _value(self, row: RuleRow, depth: Fraction) -> Lambda:
        value = row.value(depth)
        return Lambda(self.lam.exact * value if row.times else value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LambdaRule) and (self.rows, self.lam.exact) == (
            other.rows,
            other.lam.exact,
        )

    def __hash__(self) -> int:
        return hash((self.rows, self.lam.exact))

    def __repr__(self) -> str:
        return f"<LambdaRule at λ = {self.lam.key}: {'; '.join(map(str, self.rows))}>"


RuleLike = LambdaRule | Iterable[Mapping[str, Any]] | str | Path
"""A λ rule, its rows, or the YAML file that holds them."""

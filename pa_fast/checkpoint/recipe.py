"""What decides the bits of a merge, tensor by tensor: λ, the rule that spreads it, and the
rounding."""

from __future__ import annotations

from dataclasses import dataclass

from pa_fast.base import Lambda
from pa_fast.checkpoint.pairing import Pair
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike


@dataclass(frozen=True)
class Blend:
    """How one tensor is merged: its λ, and the key of its noise where its rounding is
    stochastic."""

    lam: float
    key: int | None


@dataclass(frozen=True)
class Recipe:
    """One merge of a pair: the λ of all tensors, or the swept λ of `rule`, and how they are
    rounded."""

    lam: Lambda
    rounding: Rounding
    rule: LambdaRule | None = None

    @classmethod
    def of(
        cls, lam: Lambda | float | str, rounding: str, seed: int | None, rule: RuleLike | None
    ) -> Recipe:
        """The recipe that these arguments of a merge ask for.

        Raises:
            UsageError: one of them is no such thing.
        """
        exact = Lambda(lam)
        return cls(
            exact, Rounding(rounding, seed), None if rule is None else LambdaRule.of(rule).at(exact)
        )

    def blends(self, pair: Pair) -> dict[str, Blend]:
        """How each tensor of `pair` that follows λ is merged, by name.

        Raises:
            UsageError: the rule does not fit the names.
        """
        names = [name for name in pair.names if pair.is_lerped(name)]
        lams = self.rule.resolve(names) if self.rule else dict.fromkeys(names, self.lam)
        return {name: Blend(float(lams[name]), self.rounding.key(name)) for name in names}

    def notes(self, pair: Pair) -> tuple[str, ...]:
        """What each row of the rule decides, a line each."""
        names = [name for name in pair.names if pair.is_lerped(name)]
        return tuple(str(touch) for touch in self.rule.touched(names)) if self.rule else ()

"""Schedules: ranges and lists of λ, in exact arithmetic, and those that follow from the scores."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from pa_fast.base import NUMBER, Lambda, is_truth
from pa_fast.errors import UsageError
from pa_fast.foreign import one_line
from pa_fast.question import check_question, full_name, shares

MAX_POINTS = 10_000
AUTO = "auto"
BUDGET = 12
"""Most λ of an adaptive schedule unless it is given a budget."""
_EXAMPLES = "write a range such as 0:1:0.1, a list such as 0,0.25,1/3, or both: 0:1:0.25,1.5"


def lambdas(text: str | Iterable[float | str | Lambda]) -> list[Lambda]:
    """Return the λ that `text` names, in its order, each once.

    A part is a λ (`0.3`, `1/3`) or a range `start:stop:step` with both ends; parts are separated by
    commas or are the elements of an iterable. Of equal λ the first is kept.

    Numerics: exact. `0:1:0.1` holds 0.3, not three times a rounded 0.1. A float that is off a short
        decimal by rounding alone is that decimal, so that `np.linspace(0, 1, 11)` are the points of
        `0:1:0.1`; text, fractions and `Lambda` are taken as they are.

    Example:
        for lam in pa_fast.lambdas("0:1:0.1,1/3"):
            lm.set_lambda(lam)

    Raises:
        UsageError: nothing named, not a finite number, a step that is zero, has the wrong sign or
            does not divide its range, or more than 10,000 λ.
    """
    by_key: dict[str, Lambda] = {}
    for part in _parts(text):
        for lam in _points(part):
            by_key.setdefault(lam.key, lam)
            if len(by_key) > MAX_POINTS:
                raise UsageError(
                    f"the schedule has more than {MAX_POINTS:,} λ", "take a larger step"
                )
    if not by_key:
        raise UsageError("the schedule names no λ", _EXAMPLES)
    return list(by_key.values())


@dataclass(frozen=True)
class Schedule:
    """The λ of a sweep, and the question that it is to answer.

    Attributes:
        points: the λ that are known before any score.
        is_adaptive: whether more λ follow from the scores, as `pa_fast.stats.adaptive` says.
        objective: the evaluator whose best λ is looked for; None: the first.
        keep: evaluator → the share of its score at λ = 1 that a λ must keep to be chosen.
        budget: most λ of an adaptive schedule.
    """

    points: tuple[Lambda, ...]
    is_adaptive: bool = False
    objective: str | None = None
    keep: Mapping[str, float] = field(default_factory=dict)
    budget: int = BUDGET

    @classmethod
    def of(
        cls,
        lambdas_: str | Iterable[float | str | Lambda] | Schedule,
        objective: str | None = None,
        keep: Mapping[str, float] | None = None,
        budget: int | None = None,
    ) -> Schedule:
        """Return the schedule of `"auto"`, or of what `lambdas` takes.

        Raises:
            UsageError: as `lambdas`; `keep` is no mapping to shares in (0, 1]; a budget without
                `auto`, or one that the coarse grid exceeds.
        """
        if isinstance(lambdas_, Schedule):
            return lambdas_
        kept = shares(keep)
        if not (isinstance(lambdas_, str) and lambdas_.strip() == AUTO):
            if budget is not None:
                raise UsageError(
                    "a budget for λ that are all named", "leave it out, or name the λ `auto`"
                )
            return cls(tuple(lambdas(lambdas_)), False, objective, kept)
        from pa_fast.stats import adaptive

        first = tuple(map(exact, adaptive.first().lams))
        most = BUDGET if budget is None else budget
        if not isinstance(most, int) or isinstance(most, bool) or most < len(first):
            raise UsageError(
                f"a budget of {most!r} λ", f"`auto` begins with {len(first)}: give that or more"
            )
        return cls(first, True, objective, kept, most)

    def resolved(self, evaluators: Sequence[str]) -> Schedule:
        """Return this schedule with the full names of its evaluators, of which it may have the
        beginnings.

        Raises:
            UsageError: it names none of `evaluators`, or the beginning of several; the objective is
                to keep a share; or an adaptive schedule of several has no objective.
        """
        if self.is_adaptive and self.objective is None and len(evaluators) > 1:
            raise UsageError(
                "`auto` with several evaluators needs the one whose best λ is looked for",
                f"--objective, one of: {', '.join(evaluators)}",
            )
        resolved = replace(
            self,
            objective=None if self.objective is None else full_name(self.objective, evaluators),
            keep={full_name(name, evaluators): share for name, share in self.keep.items()},
        )
        if not resolved.keep:
            return resolved
        # by name: the first evaluator of a run folder may be another than that of this sweep
        objective = resolved.needed(evaluators)[0]
        check_question(objective, resolved.keep)
        return replace(resolved, objective=objective)

    def needed(self, evaluators: Sequence[str]) -> list[str]:
        """Return the evaluators whose scores decide which λ follow."""
        first = evaluators[0] if self.objective is None else self.objective
        return list(dict.fromkeys([first, *self.keep]))

    def measured(self, evaluators: Sequence[str]) -> list[str]:
        """Return the evaluators whose scores must have items: those that decide which λ follow, and
        those that must keep a share."""
        return self.needed(evaluators) if self.is_adaptive else list(self.keep)


def exact(lam: float) -> Lambda:
    return Lambda(f"{lam:.6g}")


def _parts(text: str | Iterable[float | str | Lambda]) -> Iterator[float | str | Lambda]:
    if isinstance(text, str):
        if text.strip():  # else nothing is named
            yield from text.split(",")
    elif isinstance(text, Iterable):
        for part in text:
            if isinstance(part, str):
                yield from part.split(",")
            else:
                yield part
    else:
        yield text


def _points(part: float | str | Lambda) -> Iterator[Lambda]:
    if not isinstance(part, str):
        exact = isinstance(part, (Lambda, numbers.Rational)) or not hasattr(part, "__float__")
        yield Lambda(part) if exact else _computed(part)
        return
    part = part.strip()
    if part == AUTO:
        raise UsageError("the schedule `auto` stands alone, and for a sweep", _EXAMPLES)
    parts = part.split(":")
    if len(parts) == 1:
        yield _number(part, part)
    elif len(parts) == 3:
        yield from _range(part, *(_number(end, part).exact for end in parts))
    else:
        raise UsageError(f"`{_shown(part)}` is not a range `start:stop:step`", _EXAMPLES)


def _computed(number: Any) -> Lambda:
    """Return the decimal of up to 12 digits, or 12 places, that `number` is off by rounding alone,
    else `number` itself.

    Values of `np.linspace` and `np.arange` are off by some ulp: 0.30000000000000004, and -5.6e-17
    for 0.
    """
    value = _shortest(number)
    if not math.isfinite(value):
        return Lambda(value)
    short, places = float(f"{value:.12g}"), round(value, 12)
    if abs(short - value) <= 4 * math.ulp(value):
        return Lambda(short)
    return Lambda(
        places + 0.0 if abs(places - value) <= 16 * math.ulp(max(1.0, abs(value))) else value
    )


def _shortest(number: Any) -> float:
    """Return `number` as the shortest decimal of its own type: float32's 0.3 is not
    0.30000001192092896."""
    if is_truth(number):
        return Lambda(number)  # refuses it
    kind = str(getattr(number, "dtype", "")).rpartition(".")[2]
    try:
        if kind not in ("float16", "float32"):
            return float(number)
        import numpy

        return float(str(getattr(numpy, kind)(float(number))))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(
            f"λ `{one_line(str(number), 60)}` is not a finite number", _EXAMPLES
        ) from None


def _number(text: str, part: str) -> Lambda:
    text = text.strip()
    if not NUMBER.fullmatch(text):
        where = "" if text == part else f" in `{_shown(part)}`"
        raise UsageError(
            (
                f"λ `{_shown(text)}`{where} is not a number"
                if text
                else f"a λ is missing{where or ' between two commas'}"
            ),
            _EXAMPLES,
        )
    return Lambda(text)


def _shown(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"


def _range(part: str, start: Fraction, stop: Fraction, step: Fraction) -> Iterator[Lambda]:
    span = stop - start
    if step == 0:
        raise UsageError(f"the step of `{part}` is zero", _EXAMPLES)
    if span * step < 0:
        limits = f"{Lambda(start).key}:{Lambda(stop).key}"
        raise UsageError(
            f"the step of `{part}` leads away from its end", f"write {limits}:{Lambda(-step).key}"
        )
    count = span / step
    if count.denominator != 1:
        nearest = span / max(1, round(count))
        last = start + (count.numerator // count.denominator) * step
        raise UsageError(
            f"the step of `{part}` does not divide its range",
            f"the nearest step that does is {Lambda(nearest).key}; with this step the range ends at"
            f" {Lambda(last).key}",
        )
    if count >= MAX_POINTS:
        raise UsageError(f"`{part}` has more than {MAX_POINTS:,} λ", "take a larger step")
    for n in range(int(count) + 1):
        yield Lambda(start + n * step)

"""The answer of a sweep: the λ to use, its gain with intervals, and its cost in other scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from pa_fast.base import INSTRUCT, Lambda
from pa_fast.errors import UsageError
from pa_fast.question import check_question, shares
from pa_fast.stats.bands import LEVEL
from pa_fast.stats.choice import choose
from pa_fast.stats.crossfit import crossfit
from pa_fast.stats.finding import Evaluation, Finding, Interval, find
from pa_fast.stats.frontier import kept, undominated

POWER = 0.8
"""Share of sweeps that find a gain, below which the answer says that it would mostly be missed."""


@dataclass(frozen=True, eq=False)
class Answer:
    """The result of a sweep's statistics, for the terminal, results.json and the report alike.

    Example:
        answer = pa_fast.SweepResult.load("runs/x").answer(keep={"ifeval": 0.98})
        print(answer.sentence)
        lm.set_lambda(answer.chosen)

    Attributes:
        objective: the finding of the evaluator that chooses.
        findings: of all evaluators, in the order of the run.
        chosen: λ̂; the best score's λ where no interval can be given, of equal ones that nearest 1.
        gain: over λ = 1 at λ̂, cross-fitted, in the unit of the score; None without λ = 1 or
            intervals. Its band is that of `objective.difference(chosen)`.
        allowed: the λ that keep the shares in `keep`; None where there are none.
        keep: shares of the score at λ = 1 by evaluator, as given to `analyse`.
    """

    objective: Finding
    findings: tuple[Finding, ...]
    chosen: Lambda
    gain: float | None
    allowed: tuple[Lambda, ...] | None
    keep: Mapping[str, float]

    @property
    def others(self) -> tuple[Finding, ...]:
        """The findings of the other evaluators."""
        return tuple(one for one in self.findings if one is not self.objective)

    @property
    def is_told(self) -> bool:
        """True where some λ is told to be better than λ = 1."""
        return INSTRUCT in self.objective.bands and bool(
            (self.objective.bands[INSTRUCT].low > 0).any()
        )

    def frontier(self, other: str) -> dict[Lambda, bool]:
        """Return λ → whether it is undominated on the objective and evaluator `other`, for each λ
        that both have.

        Raises:
            StatisticsError: one of them has no intervals.
            UsageError: there is no such evaluator.
        """
        two = [self.objective, _named(self.findings, other)]
        lams = [lam for lam in two[0].lams if lam in two[1].lams]
        curves = [one.measured()[1].select([one.index(lam) for lam in lams]) for one in two]
        return dict(zip(lams, map(bool, undominated(curves, self.objective.level))))

    def document(self) -> dict[str, object]:
        """Return what files say of the answer, numbers to four significant digits: the sentence,
        the objective and λ̂; with intervals also the range of the best λ, and with λ = 1 the gain
        and the ends of its band."""
        one = self.objective
        fields: dict[str, object] = {
            "sentence": self.sentence,
            "objective": one.name,
            "lambda": self.chosen.key,
        }
        if self.keep:
            fields["keep"] = dict(self.keep)
        if one.refused is None:
            fields |= {"range": [lam.key for lam in one.range], "items": one.n, "level": one.level}
        if self.gain is not None:
            held = one.difference(self.chosen)
            figures = {"gain": self.gain, "low": held.low, "high": held.high, "p_adj": held.p}
            fields |= {name: float(f"{figure:.4g}") for name, figure in figures.items()}
        return fields

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield tidy rows, one for each evaluator, task (empty: all of them), λ and reference."""
        for finding in self.findings:
            yield from _rows(finding.name, "", finding)
            tasks = finding.tasks() if finding.curve is not None else ()
            for task in tasks if len(tasks) > 1 else ():
                yield from _rows(finding.name, task.name, task)

    @property
    def sentence(self) -> str:
        """The answer in words."""
        one = self.objective
        if one.refused is not None:
            best = one.scores[one.index(self.chosen)]
            why = f"{one.refused.message}, so no interval can be given"
            return f"λ = {self.chosen.key} scores best on {one.name}, {best:.4g}: {why}."
        if INSTRUCT not in one.lams:
            low, high = one.range
            return (
                f"λ = {self.chosen.key} is chosen; the best λ lies in {low.key}–{high.key}; "
                "λ = 1 was not evaluated, so no gain over it can be given."
            )
        if self.chosen == INSTRUCT:
            return "Instruct is best, or tied with the best" + self._limits() + "."
        if self.is_told:
            return self._gain_sentence()
        return self._no_gain_sentence()

    def _gain_sentence(self) -> str:
        one = self.objective
        held, (low, high) = one.difference(self.chosen), one.range
        assert self.gain is not None
        gain = _amount(abs(self.gain), one)
        side = "above" if self.gain >= 0 else "below"
        better = "" if one.higher_is_better else " (less is better)"
        texts = [
            f"λ = {self.chosen.key} scores {gain} {side} instruct{better} (cross-fitted; "
            f"simultaneous {100 * one.level:g} % band {_span(held, one)}; {one.n:,} items)",
            f"the best λ lies in {low.key}–{high.key}",
            *(text for text in map(self._change, self.others) if text),
        ]
        return "; ".join(texts) + self._limits() + "."

    def _no_gain_sentence(self) -> str:
        one = self.objective
        band = one.bands[INSTRUCT]
        most = float(band.high.max())
        index = one.index(self.chosen)
        missed = (band.c + float(ndtri(POWER))) * float(band.se[index]) * one.scale
        verb = "told from" if (band.high >= 0).all() else "told to be better than"
        return (
            f"No λ can be {verb} λ = 1 with {one.n:,} items: gains above {_amount(most, one)} "
            f"are excluded, gains under about {_rough(missed, 2)} would mostly be missed"
            f"{self._limits()}."
        )

    def _change(self, other: Finding) -> str:
        if other.refused is not None or not {self.chosen, INSTRUCT} <= set(other.lams):
            return ""
        held = other.difference(self.chosen)
        value = _amount(held.value, other, "+")
        return f"{other.name} changes by {value} ({_span(held, other)})"

    def _limits(self) -> str:
        if not self.keep:
            return ""
        limits = " and ".join(f"{100 * share:g} % of {name}" for name, share in self.keep.items())
        return f", of the λ that keep {limits}"


def analyse(
    evaluations: Sequence[Evaluation],
    *,
    objective: str | None = None,
    keep: Mapping[str, float] | None = None,
    level: float = LEVEL,
) -> Answer:
    """Answer a sweep from its items.

    Args:
        evaluations: of one sweep.
        objective: the evaluator whose best λ is looked for; the first if not given.
        keep: the share of the score at λ = 1 that other evaluators must keep, such as
            `{"ifeval": 0.98}`: λ that do not keep it significantly are not chosen.
        level: of bands and of the set of λ*.

    Example:
        scores = {lam: evaluate(lam) for lam in pa_fast.lambdas("0:1:0.1")}  # λ → pa_fast.Score
        print(analyse([Evaluation.of("accuracy", scores)]).sentence)

    Raises:
        UsageError: no evaluator of that name, no score, `keep` is no mapping to shares in (0, 1],
            or names the objective.
        StatisticsError: an evaluator in `keep` has no intervals.
    """
    if not evaluations:
        raise UsageError("no evaluator to answer from", "run the sweep first")
    findings = tuple(find(one, level) for one in evaluations if one.values)
    chooser = findings[0] if objective is None else _named(findings, objective)
    keep = shares(keep)
    check_question(chooser.name, keep)
    allowed = _allowed(chooser, findings, keep, level)
    chosen, gain = _choice(chooser, allowed)
    lams = None if not keep else tuple(lam for lam, ok in zip(chooser.lams, allowed) if ok)
    return Answer(chooser, findings, chosen, gain, lams, keep)


def _choice(one: Finding, allowed: NDArray[np.bool_]) -> tuple[Lambda, float | None]:
    if one.curve is None or one.items is None:
        scores = np.where(allowed, one.scores if one.higher_is_better else -one.scores, -np.inf)
        best = [lam for lam, score in zip(one.lams, scores) if score == scores.max()]
        return min(best, key=lambda lam: abs(lam.exact - 1)), None
    chosen = one.lams[choose(one.curve, allowed=allowed)]
    if INSTRUCT not in one.lams:
        return chosen, None
    gain = crossfit(one.items, one.index(INSTRUCT), one.curve, allowed)
    return chosen, gain if one.higher_is_better else -gain


def _allowed(
    one: Finding, findings: Sequence[Finding], keep: Mapping[str, float], level: float
) -> NDArray[np.bool_]:
    """Return (K,) whether each λ of `one` keeps the shares."""
    allowed = np.ones(len(one.lams), bool)
    for name, share in keep.items():
        other = _named(findings, name)
        ok = kept(other.measured()[1], other.index(INSTRUCT), share, level)
        passed = {lam for lam, one_ok in zip(other.lams, ok) if one_ok}
        allowed &= [lam in passed for lam in one.lams]
    if not allowed.any():
        raise UsageError("no λ keeps what is asked for and has a score", "evaluate λ = 1 too")
    return allowed


def _named(findings: Sequence[Finding], name: str) -> Finding:
    finding = next((one for one in findings if one.name == name), None)
    if finding is None:
        names = ", ".join(one.name for one in findings)
        raise UsageError(f"no evaluator `{name}` has a score", f"one of: {names}")
    return finding


def _rows(evaluator: str, task: str, one: Finding) -> Iterator[dict[str, object]]:
    for index, lam in enumerate(one.lams):
        measured = one.curve is not None
        shared = {
            "lambda": lam.key,
            "evaluator": evaluator,
            "task": task,
            "metric": one.unit,
            "score": float(one.scores[index]),
            "se": float(np.sqrt(one.measured()[1].cov[index, index])) if measured else None,
            "n": one.n,
        }
        for ref in one.bands if measured else (None,):
            held = one.difference(lam, ref) if ref is not None else None
            yield shared | {
                "ref": "" if ref is None else ref.key,
                "diff": None if held is None else held.value,
                "low": None if held is None else held.low,
                "high": None if held is None else held.high,
                "p_adj": None if held is None else held.p,
                "in_set": bool(one.in_set[index]) if measured else None,
            }


def _amount(value: float, one: Finding, sign: str = "") -> str:
    """Return a difference of scores in words: in points to one decimal, else in three digits or,
    of large ones, whole."""
    if one.scale == 100:
        return f"{100 * value:{sign}.1f} points".replace("-", "−")
    return _rough(value, 3, sign).replace("-", "−")


def _rough(value: float, digits: int, sign: str = "") -> str:
    whole = 10**digits <= abs(value) < 1e6
    return f"{value:{sign}.0f}" if whole else f"{value:{sign}.{digits}g}"


def _span(held: Interval, one: Finding) -> str:
    low, high = (_amount(end, one, "+").removesuffix(" points") for end in (held.low, held.high))
    return f"{low} to {high}"

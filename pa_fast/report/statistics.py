"""The statistics of a run as files: tidy rows, the method, and a table for a paper."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator

from pa_fast.base import INSTRUCT
from pa_fast.report.contents import RunReport
from pa_fast.stats import Answer, Finding, Interval
from pa_fast.stats.bands import DRAWS

COLUMNS = (
    *("lambda", "evaluator", "task", "metric", "score", "se", "n"),
    *("ref", "diff", "low", "high", "p_adj", "in_set"),
)


def statistics_csv(run: RunReport) -> bytes:
    """Return `statistics.csv`: a row for each λ of an evaluator, of a task of it, and for each
    reference, λ = 1 and 0; figures to four digits, differences in the unit of the score."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in () if run.answer is None else run.answer.rows():
        writer.writerow({name: _shown(row[name]) for name in COLUMNS})
    return text.getvalue().encode()


def statistics_json(run: RunReport) -> bytes:
    """Return `statistics.json`: how the intervals were computed, and each evaluator's half widths
    c and set of λ*."""
    document: dict[str, object] = {
        "answer": run.result.answered(),
        "method": {
            "band": "max-t over all λ, from draws of N(0, S), S of paired items by task",
            "set": "λ that a one-sided test of 'no λ is better' does not reject",
            "choice": "peak of a Gaussian process within one paired standard error of the best",
            "gain": "cross-fitted, 5 folds, 10 repeats, seed 0",
            "draws": DRAWS,
            "seed": 0,
        },
        "evaluators": [] if run.answer is None else [_described(f) for f in run.answer.findings],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _described(finding: Finding) -> dict[str, object]:
    known: dict[str, object] = {
        "name": finding.name,
        "higher_is_better": finding.higher_is_better,
        "unit": finding.unit,
        "lambdas": len(finding.lams),
        "left_out": finding.left_out,
    }
    if finding.refused is not None:
        return known | {"refused": finding.refused.message}
    low, high = finding.range
    return known | {
        "items": finding.n,
        "level": finding.level,
        "c": {ref.key: _shown(band.c) for ref, band in finding.bands.items()},
        "set": [lam.key for lam, inside in zip(finding.lams, finding.in_set) if inside],
        "range": [low.key, high.key],
    }


def _shown(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else value
    return float(f"{value:.4g}")


_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "λ": r"$\lambda$",
}


def latex(runs: Iterable[RunReport]) -> str:
    """Return a table for a paper: of each run λ̂, the objective there and at λ = 1, its gain with
    the band, and the change of every other score. Needs the package booktabs.

    Digits are those that a band leaves: its half width has two. Differences of scores from 0 to 1
    are in points.
    """
    lines = [
        r"\begin{tabular}{lrrrrl}",
        r"\toprule",
        r"run & $\hat\lambda$ & score & at $\lambda = 1$ & gain (95\,\% band) & cost \\",
        r"\midrule",
    ]
    for run in runs:
        if run.answer is None:
            lines.append(rf"{_escaped(run.name)} & \multicolumn{{5}}{{l}}{{no answer}} \\")
            continue
        lines.append(" & ".join([_escaped(run.name), *_cells(run.answer)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cells(answer: Answer) -> Iterator[str]:
    """Yield the cells of a row behind the name of the run."""
    one, chosen = answer.objective, answer.chosen
    score = float(one.scores[one.index(chosen)])
    yield chosen.key
    if answer.gain is None:
        yield from (f"${_fixed(score, 4)}$", "--", "--")
    else:
        held = one.difference(chosen)
        places = _places(one, held)
        decimals = places + (2 if one.scale == 100 else 0)  # a point is 0.01
        instruct = float(one.scores[one.index(INSTRUCT)])
        yield from (f"${_fixed(value, decimals)}$" for value in (score, instruct))
        gain, low, high = (
            _fixed(one.scale * figure, places, "+") for figure in (answer.gain, held.low, held.high)
        )
        yield f"${gain}$ (${low}$ to ${high}$)"
    yield "; ".join(_costs(answer)) or "--"


def _costs(answer: Answer) -> Iterator[str]:
    for other in answer.others:
        if other.refused is None and {answer.chosen, INSTRUCT} <= set(other.lams):
            held = other.difference(answer.chosen)
            change = _fixed(other.scale * held.value, _places(other, held), "+")
            yield f"{_escaped(other.name)} ${change}$"


def _places(finding: Finding, held: Interval) -> int:
    """Return the decimals of a difference in its scale, by which half its band has two digits; one
    where the band is empty, as at λ = 1."""
    half = finding.scale * (held.high - held.low) / 2
    return 1 if half <= 0 else max(0, 1 - math.floor(math.log10(half)))


def _fixed(value: float, places: int, sign: str = "") -> str:
    """Return `value` with so many decimals, for maths; with a power of ten where its digits would
    be very many."""
    if places <= 6 and abs(value) < 1e6:
        return f"{round(value, places) + 0.0:{sign}.{places}f}"  # + 0.0: no −0
    mantissa, exponent = f"{value:{sign}.3e}".split("e")
    return rf"{mantissa} \times 10^{{{int(exponent)}}}"


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)

"""The statistics of a run as files: tidy rows, the method, and a table for a paper."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable

from pa_fast.report.contents import RunReport
from pa_fast.stats import Finding
from pa_fast.stats.bands import DRAWS
from pa_fast.stats.finding import INSTRUCT

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
    the band, and the change of every other score. Needs the package booktabs."""
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
        one, chosen = run.answer.objective, run.answer.chosen
        cells = [_escaped(run.name), chosen.key, f"{float(one.scores[one.index(chosen)]):.4g}"]
        has_gain = run.answer.gain is not None
        cells.append(f"{float(one.scores[one.index(INSTRUCT)]):.4g}" if has_gain else "--")
        cells.append(_gain(run) if has_gain else "--")
        costs = [_cost(f, run) for f in run.answer.others if f.refused is None]
        cells.append("; ".join(cost for cost in costs if cost) or "--")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _gain(run: RunReport) -> str:
    assert run.answer is not None and run.answer.gain is not None
    one = run.answer.objective
    held = one.difference(run.answer.chosen)
    figures = [one.scale * figure for figure in (run.answer.gain, held.low, held.high)]
    gain, low, high = (f"${figure:+.3g}$" for figure in figures)
    return f"{gain} ({low} to {high})"


def _cost(finding: Finding, run: RunReport) -> str:
    assert run.answer is not None
    if not {run.answer.chosen, INSTRUCT} <= set(finding.lams):
        return ""
    held = finding.difference(run.answer.chosen)
    return f"{_escaped(finding.name)} ${finding.scale * held.value:+.3g}$"


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)

"""What a report says of one run: its answer, and figures that charts and tables are made of."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast import files
from pa_fast.base import BASE, INSTRUCT, Lambda
from pa_fast.errors import OutputError, PaFastError
from pa_fast.foreign import one_line
from pa_fast.report import delta
from pa_fast.report.delta import DeltaSizes
from pa_fast.stats import Answer, Finding
from pa_fast.sweep import journal, manifest
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.manifest import Manifest
from pa_fast.sweep.results import SweepResult

MOST_CHANGED = 12
"""Items that changed sides whose outputs are shown, for each evaluator."""
MOST_CHARACTERS = 600
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class RunReport:
    """One run as a report sees it.

    Attributes:
        answer: None where there is none; `why_not` says why.
        entries: the finished points of the journal.
        sizes: of the pair's delta, where `inspect --run` has kept them.
    """

    name: str
    result: SweepResult
    recorded: Manifest
    answer: Answer | None
    why_not: str
    entries: tuple[JournalEntry, ...]
    sizes: DeltaSizes | None

    @classmethod
    def of(cls, result: SweepResult) -> RunReport:
        """Return the report of a run folder's results.

        Raises:
            RunError: the folder is damaged.
        """
        answer, why_not = None, ""
        try:
            answer = result.answer()
        except PaFastError as error:
            why_not = f"No answer can be given: {error.message}."
        finished: dict[tuple[str, str], JournalEntry] = {}
        for entry in journal.read(result.out):
            if entry.finished:
                finished.setdefault((entry.lam, entry.evaluator), entry)
        name = one_line(pathlib.Path(os.path.abspath(result.out)).name, 60)
        recorded = manifest.load(result.out)
        entries, sizes = tuple(finished.values()), delta.load(result.out)
        return cls(name, result, recorded, answer, why_not, entries, sizes)

    @property
    def sentence(self) -> str:
        return self.why_not if self.answer is None else self.answer.sentence

    def differences(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each λ of each evaluator with intervals: its score, and its difference to
        λ = 1, in points where scores are shares."""
        for finding in () if self.answer is None else self.answer.findings:
            if finding.refused is not None or INSTRUCT not in finding.lams:
                continue
            for index, lam in enumerate(finding.lams):
                held = finding.difference(lam)
                yield {
                    "run": self.name,
                    "evaluator": finding.name,
                    "key": lam.key,
                    "lambda": float(lam),
                    "score": float(finding.scores[index]),
                    "diff": held.value * finding.scale,
                    "low": held.low * finding.scale,
                    "high": held.high * finding.scale,
                    "p_adj": held.p,
                    "in_set": bool(finding.in_set[index]),
                }

    def scores(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each score, of many λ those that are analysed."""
        shown = None if self.answer is None else {f.name: set(f.lams) for f in self.answer.findings}
        for row in self.result.rows:
            if shown is None or row.lam in shown.get(row.evaluator, ()):
                yield {
                    "run": self.name,
                    "evaluator": row.evaluator,
                    "key": row.lam.key,
                    "lambda": float(row.lam),
                    "score": row.score,
                    "unit": row.unit,
                    "effective": row.effective_lambda,
                }

    def frontier(self, other: Finding) -> list[dict[str, Any]]:
        """Return a row for each λ that the objective and `other` have, in the order of λ: both
        scores with the ends of their 95 % intervals, and whether no other λ dominates it; none
        where one of the two has no intervals."""
        if self.answer is None or other.refused or self.answer.objective.refused:
            return []
        one = self.answer.objective
        rows = []
        for lam, is_undominated in self.answer.frontier(other.name).items():
            x, y = (_score(finding, lam) for finding in (one, other))
            rows.append(
                {"run": self.name, "key": lam.key, "lambda": float(lam), "free": is_undominated}
                | {"x": x[0], "x_low": x[1], "x_high": x[2]}
                | {"y": y[0], "y_low": y[1], "y_high": y[2]}
            )
        return rows

    def tasks(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each task of each evaluator at λ̂, the evaluator itself first."""
        if self.answer is None:
            return
        chosen = self.answer.chosen
        for finding in self.answer.findings:
            details = self._details(finding.name, chosen)
            yield _task_row(self.name, finding.name, "all", finding, chosen) | details
            tasks = finding.tasks() if finding.refused is None else ()
            for task in tasks if len(tasks) > 1 else ():
                yield _task_row(self.name, finding.name, task.name, task, chosen)

    def _details(self, evaluator: str, lam: Lambda) -> dict[str, Any]:
        row = self.result.scores(evaluator).get(lam.key)
        known = {} if row is None else row.details
        ties, n = known.get("ties"), 0 if row is None else row.n
        return {"truncated": known.get("truncated"), "ties": ties and ties / max(n, 1)}

    def seconds(self) -> Iterator[tuple[str, float]]:
        """Yield what the time of the recorded points went to, in seconds."""
        switches = {entry.lam: entry.switch_s or 0.0 for entry in self.entries}
        yield "switches", sum(switches.values())
        for name in self.result.evaluators:
            spent = (e.eval_s or 0.0 for e in self.entries if e.evaluator == name)
            yield f"evaluation, {name}", sum(spent)

    def changed(self) -> Iterator[dict[str, Any]]:
        """Yield items whose score at λ̂ is on the other side of that at λ = 1, with their outputs at
        λ = 0, λ̂ and 1, gains and losses in turn; nothing where no outputs are kept."""
        if self.answer is None or self.answer.chosen == INSTRUCT:
            return
        lams = dict.fromkeys([BASE, self.answer.chosen, INSTRUCT])
        for name in self.result.evaluators:
            by_lambda = {lam: self._outputs(name, lam) for lam in lams}
            if not by_lambda[self.answer.chosen] or not by_lambda[INSTRUCT]:
                continue
            higher = dict(zip(self.result.evaluators, self.result.higher_is_better))[name]
            moved: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
            for item, mine in by_lambda[self.answer.chosen].items():
                theirs = by_lambda[INSTRUCT].get(item)
                if theirs is None or mine["score"] == theirs["score"]:
                    continue
                gained = (mine["score"] > theirs["score"]) == higher
                outputs = [
                    {
                        "key": lam.key,
                        "output": _cut(rows[item].get("output")),
                        "score": rows[item]["score"],
                    }
                    for lam, rows in by_lambda.items()
                    if item in rows
                ]
                moved[gained].append(
                    {
                        "evaluator": name,
                        "id": item[1],
                        "gained": gained,
                        "prompt": _cut(mine.get("prompt")),
                        "outputs": outputs,
                    }
                )
            half = MOST_CHANGED // 2
            yield from moved[True][: max(half, MOST_CHANGED - len(moved[False]))]
            yield from moved[False][: max(half, MOST_CHANGED - len(moved[True]))]

    def _outputs(self, evaluator: str, lam: Lambda) -> dict[tuple[str, str], dict[str, Any]]:
        """Return the rows of an evaluator's outputs.jsonl at λ by group and id; none without the
        file, or where it is not what an evaluator writes."""
        folder = self._folders.get((lam.key, evaluator))
        if folder is None:
            return {}
        path = self.result.out / folder / "outputs.jsonl"
        try:
            if path.stat().st_size > _MOST_BYTES:
                return {}
            rows = [json.loads(line) for line in files.read_own(path).splitlines()]
            return {
                (str(row.get("group")), str(row["id"])): row
                for row in rows
                if isinstance(row.get("score"), (int, float))
            }
        except (OSError, OutputError, ValueError, KeyError, AttributeError, RecursionError):
            return {}

    @functools.cached_property
    def _folders(self) -> Mapping[tuple[str, str], str]:
        return {(e.lam, e.evaluator): e.outputs for e in self.entries if e.outputs is not None}


def _score(finding: Finding, lam: Lambda) -> tuple[float, float, float]:
    """Return a score with the ends of its 95 % interval, in the direction that is reported."""
    index = finding.index(lam)
    score, half = (
        float(finding.scores[index]),
        1.96 * math.sqrt(finding.measured()[1].cov[index, index]),
    )
    return score, score - half, score + half


def _task_row(run: str, evaluator: str, task: str, finding: Finding, lam: Lambda) -> dict[str, Any]:
    def score(lam: Lambda) -> float | None:
        return float(finding.scores[finding.lams.index(lam)]) if lam in finding.lams else None

    row: dict[str, Any] = {
        "run": run,
        "evaluator": evaluator,
        "task": task,
        "key": lam.key,
        "base": score(BASE),
        "chosen": score(lam),
        "instruct": score(INSTRUCT),
        "n": finding.n or None,
    }
    if finding.refused is None and {lam, INSTRUCT} <= set(finding.lams):
        held, wins = finding.difference(lam), finding.wins(lam)
        row |= {"diff": held.value * finding.scale, "p_adj": held.p, "scale": finding.scale}
        row |= {"low": held.low * finding.scale, "high": held.high * finding.scale}
        row |= {"wins": wins[0], "losses": wins[1]}
    return row


def _cut(text: Any) -> str:
    shown = "" if text is None else str(text)
    return shown if len(shown) <= MOST_CHARACTERS else f"… {shown[-MOST_CHARACTERS:]}"

"""Results of a run: the finished points of its journal, in one fixed order."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pa_fast import files
from pa_fast.base import Lambda
from pa_fast.errors import PaFastError, UsageError
from pa_fast.files import path_of
from pa_fast.foreign import one_line
from pa_fast.question import check_question, full_name, shares
from pa_fast.sweep import journal, manifest
from pa_fast.sweep.entry import JournalEntry

if TYPE_CHECKING:
    import pandas
    from rich.table import Table
    from rich.text import Text

    from pa_fast.stats import Answer, Evaluation
    from pa_fast.stats.items import Column

_LEAST_WIDTH = 10  # of a column whose name is wrapped
CSV_HEADER = ("lambda", "evaluator", "score", "unit", "n", "effective_lambda")


@dataclass(frozen=True)
class ResultRow:
    """One finished point.

    Attributes:
        effective_lambda: to 6 significant digits; None where base and instruct are equal.
        details: further figures of the evaluator.
        intended_lambda: `effective_lambda` without rounding; None where that is λ.
        items: file of the items in the run folder, None where there is none.
    """

    lam: Lambda
    evaluator: str
    score: float
    unit: str
    n: int
    effective_lambda: float | None
    details: Mapping[str, float] = field(default_factory=dict)
    intended_lambda: float | None = None
    items: str | None = None


@dataclass(frozen=True)
class Failure:
    """One point whose last attempt failed, with its error, and the traceback of an error that
    pa_fast did not raise itself."""

    lam: Lambda
    evaluator: str
    error: str
    traceback: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """All points of the run folder `out`: by λ, then by evaluator in order of first appearance.

    Attributes:
        lambdas: all λ of the schedule, also those without a finished point.
        approximation: the store of a sweep whose delta is not all of the difference, else None.
        objective, keep: the question of the last sweep in the folder; see `answer`.

    Example:
        result = pa_fast.SweepResult.load("runs/x")
        print(result.best("accuracy").lam, result.answer().sentence)
        result.to_pandas().pivot(index="lambda", columns="evaluator", values="score")
    """

    out: pathlib.Path
    lambdas: tuple[Lambda, ...]
    evaluators: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    rows: tuple[ResultRow, ...]
    failures: tuple[Failure, ...]
    approximation: str | None = None
    objective: str | None = None
    keep: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SweepResult:
        """Return the results of the run in `folder`, from run.json and the journal alone; writes
        nothing.

        Raises:
            RunError: not a run folder, or a damaged one.
        """
        return load(path_of(folder, "run folder"))

    def scores(self, evaluator: str) -> dict[str, ResultRow]:
        """Return the finished points of `evaluator`, by the key of their λ.

        Raises:
            UsageError: no evaluator has this name, or alone begins so.
        """
        return dict(self._columns[full_name(evaluator, self.evaluators)])

    @functools.cached_property
    def _columns(self) -> dict[str, dict[str, ResultRow]]:
        """The finished points of each evaluator by the key of their λ, cached."""
        columns: dict[str, dict[str, ResultRow]] = {name: {} for name in self.evaluators}
        for row in self.rows:
            columns[row.evaluator][row.lam.key] = row
        return columns

    @functools.cached_property
    def _higher(self) -> dict[str, bool]:
        return dict(zip(self.evaluators, self.higher_is_better))

    def best(self, evaluator: str | None = None) -> ResultRow | None:
        """Return the best point of `evaluator`, a name or the start of one, the smallest λ among
        equals; None where no point is finished.

        Raises:
            UsageError: there is no such evaluator, or several and none is named.
        """
        if evaluator is None:
            if len(self.evaluators) != 1:
                raise UsageError(
                    f"the best of which evaluator of {self.out}?",
                    f"name one of: {', '.join(self.evaluators)}",
                )
            evaluator = self.evaluators[0]
        evaluator = full_name(evaluator, self.evaluators)
        sign = -1 if self._higher.get(evaluator) else 1
        return min(self.scores(evaluator).values(), key=lambda row: sign * row.score, default=None)

    def ranked(self, evaluator: str) -> list[ResultRow]:
        """Return the finished points of `evaluator`, the best first, the smallest λ first among
        equals."""
        evaluator = full_name(evaluator, self.evaluators)
        rows = self.scores(evaluator).values()
        sign = -1 if self._higher[evaluator] else 1
        return sorted(rows, key=lambda row: sign * row.score)

    def evaluations(self) -> list[Evaluation]:
        """Return the finished points with their items, an `Evaluation` for each evaluator that has
        any, for `pa_fast.stats.analyse`."""
        from pa_fast.stats import Evaluation

        evaluations = []
        for name in self.evaluators:
            rows = {row.lam: row for row in self.scores(name).values()}
            if rows:
                values = {lam: row.score for lam, row in rows.items()}
                read = functools.partial(_column, self.out, rows)
                unit = next(iter(rows.values())).unit
                evaluations.append(Evaluation(name, self._higher[name], values, read, unit))
        return evaluations

    def answer(
        self, objective: str | None = None, keep: Mapping[str, float] | None = None
    ) -> Answer:
        """Return the answer: λ̂, its gain over λ = 1, intervals, and the change of other scores.

        Args:
            objective: the evaluator whose best λ is looked for, or the beginning of its name; if
                not given, that of the sweep, or else the first.
            keep: shares of the score at λ = 1 that evaluators must keep, `{"ifeval": 0.98}`; if not
                given, those of the sweep.

        Raises:
            UsageError, StatisticsError: see `pa_fast.stats.analyse`.
            RunError: a file of items is missing or damaged.

        Example:
            answer = pa_fast.SweepResult.load("runs/x").answer()
            print(answer.sentence, answer.chosen, answer.gain)
        """
        return self.with_question(objective, keep)._answer

    def with_question(
        self, objective: str | None = None, keep: Mapping[str, float] | None = None
    ) -> SweepResult:
        """Return these results with another question for `answer` and the files, see there.

        Raises:
            UsageError: no evaluator of that name; `keep` is no mapping to shares, is of the
                objective, or of an evaluator without a score at λ = 1.
        """
        if objective is None and keep is None:
            return self
        chosen = self.objective if objective is None else full_name(objective, self.evaluators)
        kept = shares(self.keep if keep is None else keep)
        kept = {full_name(name, self.evaluators): share for name, share in kept.items()}
        scored = [name for name in self.evaluators if self._columns[name]]
        check_question(chosen or next(iter(scored), ""), kept)
        for name, share in kept.items():
            if "1" not in self._columns[name]:
                raise UsageError(
                    f"{self.out}: `{name}` has no score at λ = 1, of which it is to keep"
                    f" {100 * share:g} %",
                    "sweep λ = 1 into this folder first",
                )
        return replace(self, objective=chosen, keep=kept)

    @functools.cached_property
    def _answer(self) -> Answer:
        """The answer, cached: terminal, page and files share it."""
        from pa_fast.stats import analyse

        return analyse(self.evaluations(), objective=self.objective, keep=self.keep)

    def answered(self) -> dict[str, object]:
        """Return the answer as results.json has it, to four significant digits: `sentence` alone
        where no interval can be given, or the reason why there is no answer."""
        try:
            answer = self.answer()
        except PaFastError as error:
            return {"sentence": f"No answer can be given: {error.message}."}
        except ImportError as error:  # a run is recorded whatever is installed
            return {"sentence": f"No answer can be given: {error.name} is not installed."}
        return answer.document()

    def table(self) -> Table:
        """Return a table with λ down, evaluators across, the best score of each column marked."""
        return table([self])

    def to_pandas(self) -> pandas.DataFrame:
        """Return a row for each finished point: `lambda` as a float, `lambda_key` as files spell
        it, and the columns of results.csv.

        Raises:
            PaFastError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise PaFastError(
                "to_pandas needs pandas, which is not installed", "pip install pandas"
            ) from None
        columns = ("lambda", "lambda_key", *CSV_HEADER[1:])
        rows = [
            (float(r.lam), r.lam.key, r.evaluator, r.score, r.unit, r.n, r.effective_lambda)
            for r in self.rows
        ]
        return pandas.DataFrame(rows, columns=list(columns))

    def to_csv(self) -> bytes:
        """Return `results.csv`: floats as Python's shortest exact text; `lambda` is the exact key,
        `lambda_value` a float."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*CSV_HEADER, "lambda_value"))
        for row in self.rows:
            effective = "" if row.effective_lambda is None else repr(row.effective_lambda)
            writer.writerow(
                (
                    row.lam.key,
                    row.evaluator,
                    repr(row.score),
                    row.unit,
                    row.n,
                    effective,
                    repr(float(row.lam)),
                )
            )
        return text.getvalue().encode()

    def to_json(self) -> bytes:
        """Return `results.json`: the answer, the rows, the best points, and the points that failed;
        their errors are in the journal."""
        document: dict[str, object] = {"answer": self.answered()} if self.rows else {}
        document |= {} if self.approximation is None else {"approximation": self.approximation}
        document |= {
            "lambdas": [lam.key for lam in self.lambdas],
            "evaluators": [self._summary(name) for name in self.evaluators],
            "rows": [
                dict(
                    zip(
                        CSV_HEADER,
                        (r.lam.key, r.evaluator, r.score, r.unit, r.n, r.effective_lambda),
                    )
                )
                | ({} if r.intended_lambda is None else {"intended_lambda": r.intended_lambda})
                | ({"details": dict(r.details)} if r.details else {})
                for r in self.rows
            ],
            # messages may differ between equal runs: an address, a path, a host
            "failures": [
                {"lambda": failure.lam.key, "evaluator": failure.evaluator}
                for failure in self.failures
            ],
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    def _summary(self, evaluator: str) -> dict[str, object]:
        best = self.best(evaluator)
        higher = self._higher[evaluator]
        point = None if best is None else {"lambda": best.lam.key, "score": best.score}
        return {"name": evaluator, "higher_is_better": higher, "best": point}


def load(folder: pathlib.Path) -> SweepResult:
    """Return the results of the run in `folder`, from run.json and the journal alone.

    Raises:
        RunError: not a run folder, or a damaged one.
    """
    run = manifest.load(folder)
    names = tuple(column.name for column in run.evaluators)
    latest: dict[tuple[str, str], JournalEntry] = {}
    for entry in journal.read(folder):
        before = latest.get((entry.lam, entry.evaluator))
        if before is None or not before.finished:
            latest[entry.lam, entry.evaluator] = entry
    known = {key: Lambda(key) for key in run.lambdas}
    points = tuple(sorted(known.values(), key=lambda lam: lam.exact))
    ordered = [
        latest[lam.key, name] for lam in points for name in names if (lam.key, name) in latest
    ]
    return SweepResult(
        out=folder,
        lambdas=points,
        evaluators=names,
        higher_is_better=tuple(column.higher_is_better for column in run.evaluators),
        rows=tuple(_row(known[entry.lam], entry) for entry in ordered if entry.finished),
        failures=tuple(
            Failure(known[e.lam], e.evaluator, e.error or "", e.traceback)
            for e in ordered
            if not e.finished
        ),
        approximation=(
            None
            if run.engine.get("lossless", True)
            else one_line(str(run.engine.get("store")), 120)
        ),
        objective=run.objective if run.objective in names else None,
        keep={name: share for name, share in run.keep.items() if name in names},
    )


def write(result: SweepResult) -> None:
    """Write `results.csv` and `results.json` into the run folder, each whole or not at all."""
    files.write(result.out / "results.csv", result.to_csv())
    files.write(result.out / "results.json", result.to_json())


def table(results: Iterable[SweepResult]) -> Table:
    """Return a table of several runs side by side: λ down, evaluators across, the best score of
    each column marked with a star."""
    from rich.table import Table
    from rich.text import Text

    results = list(results)
    caption = ["* best of its column"] if any(result.rows for result in results) else []
    caption += [
        f"approximate delta: {a}"
        for a in dict.fromkeys(result.approximation for result in results)
        if a
    ]
    shown = Table(
        caption=Text("\n".join(caption), "table.caption") if caption else None,
        caption_justify="right",
    )
    shown.add_column("λ", justify="right", overflow="fold")
    for result in results:
        run = f"{one_line(result.out.name)}\n" if len(results) > 1 else ""
        shown.add_column(Text(f"{run}effective λ"), justify="right", overflow="fold")
        for name in result.evaluators:
            unit = next((row.unit for row in result.scores(name).values()), "")
            shown.add_column(Text(f"{run}{name}\n{unit}"), justify="right", overflow="fold")
    points = {lam.key: lam for result in results for lam in result.lambdas}
    columns = [column for result in results for column in _cells(result)]
    for key in sorted(points, key=lambda key: points[key].exact):
        shown.add_row(Text(key), *(column.get(key, Text("")) for column in columns))
    for column in shown.columns:  # names wrap where the terminal is narrow; figures do not
        figures = [cell.cell_len for cell in column.cells if isinstance(cell, Text)]
        column.min_width = min(
            max([_LEAST_WIDTH if column is not shown.columns[0] else 1, *figures]), 2 * _LEAST_WIDTH
        )
    return shown


def _cells(result: SweepResult) -> list[dict[str, Text]]:
    """Return the columns of one run, each by the key of λ: its effective λ, then each evaluator's
    score."""
    from rich.text import Text

    # of equal keys the first row's
    effective = {row.lam.key: row.effective_lambda for row in reversed(result.rows)}
    columns = [{key: Text(f"{value:.4g}") for key, value in effective.items() if value is not None}]
    for name in result.evaluators:
        best = result.best(name)
        cells = {f.lam.key: Text("failed  ", "red") for f in result.failures if f.evaluator == name}
        for key, row in result.scores(name).items():
            star = best is not None and row.score == best.score
            cells[key] = (
                Text(f"{score_text(row.score)} *", "bold")
                if star
                else Text(f"{score_text(row.score)}  ")
            )
        columns.append(cells)
    return columns


def score_text(score: float) -> str:
    """Return a score for people: four decimals, or four digits where it is large or tiny."""
    return f"{score:.4f}" if 1e-3 <= abs(score) < 100 or score == 0 else f"{score:.4g}"


def _row(lam: Lambda, entry: JournalEntry) -> ResultRow:
    assert entry.score is not None and entry.unit is not None and entry.n is not None
    effective, intended = _rounded(entry.effective_lambda), _rounded(entry.intended_lambda)
    return ResultRow(
        lam,
        entry.evaluator,
        entry.score,
        entry.unit,
        entry.n,
        effective,
        entry.details or {},
        intended,
        entry.items,
    )


def _column(folder: pathlib.Path, rows: Mapping[Lambda, ResultRow], lam: Lambda) -> Column:
    return journal.read_items(folder, rows[lam].items, rows[lam].score)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")

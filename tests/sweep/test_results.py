"""What a run leaves for people and programs: CSV, JSON, table, report, progress lines."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pa_fast.base import Engine
from pa_fast.errors import PaFastError, RunError, UsageError
from pa_fast.sweep import results, sweep
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.progress import TerminalProgress
from pa_fast.sweep.report import report
from pa_fast.sweep.results import SweepResult
from tests.sweep.fakes import FakeEngine, Scorer


def fail_at_half(engine: Engine) -> None:
    if engine.weights.lam == 0.5:
        raise ValueError("at half")


def run(out: Path, points: str = "0:1:0.25,1/3", **options: object) -> SweepResult:
    scorers = [Scorer("icl", act=fail_at_half), Scorer("ppl, long", "nats per token", higher=False)]
    return sweep(FakeEngine(), points, scorers, out, figure=False, **options)  # type: ignore[arg-type]


def text_of(drawn: object) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_csv_has_the_columns_and_exact_numbers(tmp_path: Path) -> None:
    result = run(tmp_path)
    text = (tmp_path / "results.csv").read_text()
    assert text.splitlines()[0] == "lambda,evaluator,score,unit,n,effective_lambda,lambda_value"
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(result.rows) == 11
    assert [row["lambda"] for row in rows] == ["0", "0", "0.25", "0.25", "1/3", "1/3", "0.5", "0.75", "0.75", "1", "1"]
    for row, found in zip(rows, result.rows):
        assert float(row["lambda_value"]) == float(found.lam)
        assert float(row["score"]) == found.score
        assert (row["evaluator"], row["unit"], int(row["n"])) == (found.evaluator, found.unit, found.n)
        assert row["effective_lambda"] == f"{float(row['effective_lambda']):.6g}" == repr(found.effective_lambda)


def test_json_holds_rows_bests_and_failures_without_times_or_hosts(tmp_path: Path) -> None:
    result = run(tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["lambdas"] == ["0", "0.25", "1/3", "0.5", "0.75", "1"]
    assert document["failures"] == [{"lambda": "0.5", "evaluator": "icl"}]
    assert [row["score"] for row in document["rows"]] == [row.score for row in result.rows]
    for name, summary in zip(("icl", "ppl, long"), document["evaluators"]):
        best = result.best(name)
        assert best is not None and summary["best"] == {"lambda": best.lam.key, "score": best.score}
    assert set(document["rows"][0]) == set(results.CSV_HEADER)


def test_equal_runs_give_equal_files_whatever_the_order_of_λ(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", "1/3,1:0:-0.25")
    run(tmp_path / "c", "0.5")
    run(tmp_path / "c", "1/3,1:0:-0.25")
    for name in ("results.csv", "results.json"):
        assert (
            (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
        )


def test_best_follows_the_direction_of_the_evaluator(tmp_path: Path) -> None:
    result = run(tmp_path)
    best, lowest = result.best("icl"), result.best("ppl, long")
    assert best is not None and best.score == max(row.score for row in result.rows if row.evaluator == "icl")
    assert lowest is not None and lowest.score == min(row.score for row in result.rows if row.evaluator == "ppl, long")
    with pytest.raises(UsageError, match="no evaluator `x`"):
        result.best("x")


def test_an_undefined_effective_lambda_is_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine.weights, "effective_lambda", lambda: float("nan"))
    result = sweep(engine, "0.5", [Scorer("a")], tmp_path, figure=False)
    assert result.rows[0].effective_lambda is None
    assert (tmp_path / "results.csv").read_text().endswith(",4,,0.5\n")
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["effective_lambda"] is None


def test_table_marks_bests_and_failures(tmp_path: Path) -> None:
    result = run(tmp_path)
    text = text_of(result.table())
    best = result.best("icl")
    assert best is not None and f"{best.score:.4f} *" in text
    equal = sum(row.score == result.best(name).score for name in result.evaluators for row in result.scores(name).values())
    assert text.count("*") == equal + 1 and text.count("failed") == 1, (
        "every one of equal bests is marked, and the star explained"
    )
    assert "nats per token" in text and "effective λ" in text


def test_a_report_rebuilds_the_files_from_the_journal_alone(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b", "0.5,2")
    before = {name: (tmp_path / "a" / name).read_bytes() for name in ("results.csv", "results.json")}
    for name in before:
        (tmp_path / "a" / name).unlink()
    runs = report([tmp_path / "a", str(tmp_path / "b")], figure=False)
    assert runs == [first, second]
    assert {name: (tmp_path / "a" / name).read_bytes() for name in before} == before
    text = text_of(results.table(runs))
    assert all(text.count(head) >= 3 for head in ("a ", "b ")) and " 2 " in text


def test_a_report_on_no_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run(tmp_path / "a")
    (tmp_path / "a" / "results.csv").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is not a run folder"):
        report([tmp_path / "a", tmp_path / "empty"], figure=False)
    assert not (tmp_path / "a" / "results.csv").exists()
    with pytest.raises(UsageError):
        report([])


def test_progress_is_one_line_per_point_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    run(tmp_path, "0,0.5", progress=TerminalProgress(console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 4
    assert (
        lines[0].startswith("λ 0")
        and "icl" in lines[0]
        and "accuracy  switch " in lines[0]
        and "1/4" in lines[0]
        and "left" in lines[0]
    )
    assert "failed: ValueError: at half" in lines[2]
    assert "4/4" in lines[3] and "left" not in lines[3]
    run(tmp_path, "0,0.5", progress=TerminalProgress(console))
    assert "3 of 4 points are finished already" in console.file.getvalue()  # type: ignore[attr-defined]


def test_progress_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    run(tmp_path, "0,0.5", progress=TerminalProgress(console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "━" in text and "\x1b[" in text


def test_a_result_loads_from_a_folder_given_as_text_or_path(tmp_path: Path) -> None:
    result = run(tmp_path / "a")
    assert SweepResult.load(tmp_path / "a") == result == SweepResult.load(str(tmp_path / "a"))
    with pytest.raises(RunError, match="is not a run folder"):
        SweepResult.load(str(tmp_path))


def test_best_needs_a_name_only_where_there_are_several(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which evaluator") as caught:
        run(tmp_path / "a").best()
    assert caught.value.hint == "name one of: icl, ppl, long"
    one = sweep(FakeEngine(), "0,1", [Scorer("icl")], tmp_path / "b", figure=False)
    assert one.best() == one.best("icl") is not None


def test_a_frame_has_a_numeric_and_an_exact_λ(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    result = run(tmp_path)
    frame = result.to_pandas()
    assert list(frame.columns) == ["lambda", "lambda_key", *results.CSV_HEADER[1:]]
    assert frame["lambda"].dtype == float and list(frame["lambda"]) == [float(row.lam) for row in result.rows]
    assert list(frame["lambda_key"]) == [row.lam.key for row in result.rows]
    assert list(frame["score"]) == [row.score for row in result.rows]


def test_a_frame_without_pandas_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PaFastError, match="needs pandas") as caught:
        result.to_pandas()
    assert caught.value.hint == "pip install pandas"


class Recorded:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def recorded(self, entry: Entry) -> None:
        self.entries.append(entry)


def test_a_progress_of_one_method_is_enough(tmp_path: Path) -> None:
    told = Recorded()
    result = run(tmp_path, "0,1", progress=told)
    assert [(entry.lam, entry.evaluator) for entry in told.entries] == [(row.lam.key, row.evaluator) for row in result.rows]


@pytest.mark.parametrize("progress", [True, print, object()])
def test_a_progress_that_hears_nothing_is_refused(tmp_path: Path, progress: object) -> None:
    with pytest.raises(UsageError, match="hears nothing of a sweep"):
        run(tmp_path / "run", "0", progress=progress)
    assert not (tmp_path / "run").exists()

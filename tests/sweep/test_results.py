"""What a run leaves for people and programs: CSV, JSON, table, report, progress lines."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console

from pa_fast import cli, files
from pa_fast.base import Engine
from pa_fast.cli.tables import blocks
from pa_fast.errors import OutputError, PaFastError, RunError, UsageError
from pa_fast.sweep import journal, results, sweep
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.progress import TerminalProgress
from pa_fast.sweep.report import report
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import lambdas
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
    assert [row["lambda"] for row in rows] == [
        "0",
        "0",
        "0.25",
        "0.25",
        "1/3",
        "1/3",
        "0.5",
        "0.75",
        "0.75",
        "1",
        "1",
    ]
    for row, found in zip(rows, result.rows):
        assert float(row["lambda_value"]) == float(found.lam)
        assert float(row["score"]) == found.score
        assert (row["evaluator"], row["unit"], int(row["n"])) == (
            found.evaluator,
            found.unit,
            found.n,
        )
        assert (
            row["effective_lambda"]
            == f"{float(row['effective_lambda']):.6g}"
            == repr(found.effective_lambda)
        )


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
            (tmp_path / "a" / name).read_bytes()
            == (tmp_path / "b" / name).read_bytes()
            == (tmp_path / "c" / name).read_bytes()
        )


def test_best_follows_the_direction_of_the_evaluator(tmp_path: Path) -> None:
    result = run(tmp_path)
    best, lowest = result.best("icl"), result.best("ppl, long")
    assert best is not None and best.score == max(
        row.score for row in result.rows if row.evaluator == "icl"
    )
    assert lowest is not None and lowest.score == min(
        row.score for row in result.rows if row.evaluator == "ppl, long"
    )
    with pytest.raises(UsageError, match="no evaluator is called `x`"):
        result.best("x")


def test_an_undefined_effective_lambda_is_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine.weights, "effective_lambda", lambda: float("nan"))
    result = sweep(engine, "0.5", [Scorer("a")], tmp_path, figure=False)
    assert result.rows[0].effective_lambda is None
    assert (tmp_path / "results.csv").read_text().endswith(",4,,0.5\n")
    assert (
        json.loads((tmp_path / "results.json").read_text())["rows"][0]["effective_lambda"] is None
    )


def test_table_marks_bests_and_failures(tmp_path: Path) -> None:
    result = run(tmp_path)
    text = text_of(result.table())
    best = result.best("icl")
    assert best is not None and f"{best.score:.4f} *" in text
    equal = sum(
        row.score == result.best(name).score
        for name in result.evaluators
        for row in result.scores(name).values()
    )
    assert text.count("*") == equal + 1 and text.count("failed") == 1, (
        "every one of equal bests is marked, and the star explained"
    )
    assert "nats per token" in text and "effective λ" in text


def test_a_report_rebuilds_the_files_from_the_journal_alone(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b", "0.5,2")
    before = {
        name: (tmp_path / "a" / name).read_bytes() for name in ("results.csv", "results.json")
    }
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


def test_a_report_loses_no_row_that_is_written_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "0,1")
    load, added = results.load, []

    def racing(folder: Path) -> SweepResult:
        found = load(folder)
        if not added:  # a sweep that ends after the report has read, and before it writes
            added.append(True)
            run(tmp_path, "0,0.25,1")
        return found

    monkeypatch.setattr(results, "load", racing)
    (reported,) = report([tmp_path], figure=False)
    assert [row.lam.key for row in reported.rows] == ["0", "0", "0.25", "0.25", "1", "1"]
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 7


def test_a_report_waits_for_whoever_writes_the_results(tmp_path: Path) -> None:
    run(tmp_path, "0,1")
    before = (tmp_path / "results.csv").stat().st_mtime_ns
    reporting = threading.Thread(target=report, args=([tmp_path],), kwargs={"figure": False})
    with files.locked(tmp_path / journal.LOCK):
        reporting.start()
        reporting.join(0.3)
        assert reporting.is_alive() and (tmp_path / "results.csv").stat().st_mtime_ns == before
    reporting.join(10)
    assert (tmp_path / "results.csv").stat().st_mtime_ns > before


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_a_report_on_a_folder_that_may_not_be_written_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: int
) -> None:
    made = run(tmp_path, "0,1")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    opened = os.open

    def read_only(path: str | Path, flags: int, *more: int, **options: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(tmp_path)):
            raise OSError(reason, os.strerror(reason), str(path))
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", read_only)
    notes: list[str] = []
    assert report([tmp_path], noted=notes.append) == [made]
    assert (
        len(notes) == 1
        and f"nothing was written for {tmp_path}" in notes[0]
        and os.strerror(reason) in notes[0]
    )
    monkeypatch.setattr(sys, "argv", ["pa-fast", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert (
        not end.value.code
        and "effective λ" in shown.out
        and "note: nothing was written" in shown.err
    )
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    reason = errno.ENOSPC
    with pytest.raises(OutputError, match="No space left"):
        report([tmp_path])


@pytest.mark.parametrize("count", [1, 2, 4, 5, 12])
def test_a_narrow_terminal_cuts_no_name_and_no_figure(count: int, tmp_path: Path) -> None:
    names = tuple(f"icl:tasks_of_group_{n:02},shots=5,mode=cloze" for n in range(count))
    points = tuple(lambdas("0:1:0.5"))
    scores = {
        (lam.key, name): 0.5 + n / 100 + float(lam) / 1000
        for lam in points
        for n, name in enumerate(names)
    }
    rows = tuple(
        results.ResultRow(lam, name, scores[lam.key, name], "accuracy (per character)", 9, 0.25)
        for lam in points
        for name in names
    )
    table = results.SweepResult(tmp_path, points, names, (True,) * count, rows, ()).table()
    out = Console(width=80, file=io.StringIO())
    for block in blocks(table, 80):
        out.print(block)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for score in scores.values():
        assert f" {score:.4f} " in text
    flat = read_down(text)
    for name in names:
        assert name in flat
    assert text.count("* best of its column") == 1


def read_down(text: str) -> str:
    """What stands in the header cells of tables, column by column, without the breaks that wrapping
    made."""
    found, header = "", []
    for line in text.splitlines():
        if line.startswith("┃"):
            header.append([cell.strip() for cell in line.strip("┃").split("┃")])
        elif header:
            found += "".join("".join(column) + "|" for column in zip(*header))
            header = []
    return found


def test_progress_tells_how_far_an_evaluator_is_and_counts_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(sys.modules[TerminalProgress.__module__], "time", clock)
    progress = TerminalProgress(Console(file=io.StringIO(), width=100, force_terminal=True))
    engine, seen = FakeEngine(), []
    engine.on_progress = None  # type: ignore[attr-defined]

    def act(engine: Engine) -> None:
        now[0] += 10
        engine.on_progress(20, 80)  # type: ignore[attr-defined]
        bar = progress._bar
        assert bar is not None
        seen.append((bar.tasks[0].description, bar.tasks[0].completed, progress._countdown()))
        now[0] += 5
        seen.append(progress._countdown())

    sweep(
        engine,
        "0",
        [Scorer("icl", act=act), Scorer("b")],
        tmp_path,
        figure=False,
        progress=progress,
    )
    assert seen == [("λ 0 · icl · 20/80", 0.25, "· 1 min 10 s left"), "· 1 min 05 s left"]
    assert engine.on_progress is None  # type: ignore[attr-defined]
    assert progress._countdown() == ""


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


def test_an_evaluator_is_named_by_the_start_of_its_name_wherever_it_is_named(
    tmp_path: Path,
) -> None:
    result = run(tmp_path)
    assert result.best("ppl") == result.best("ppl, long") is not None
    assert result.scores("ppl") == result.scores("ppl, long")
    assert result.ranked("ppl") == result.ranked("ppl, long")
    assert result.ranked("ppl")[0] == result.best("ppl")
    for named in (result.best, result.scores, result.ranked):
        for odd in ("", "pl", 5):
            with pytest.raises(UsageError):
                named(odd)  # type: ignore[operator]


def test_a_frame_has_a_numeric_and_an_exact_λ(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    result = run(tmp_path)
    frame = result.to_pandas()
    assert list(frame.columns) == ["lambda", "lambda_key", *results.CSV_HEADER[1:]]
    assert frame["lambda"].dtype == float and list(frame["lambda"]) == [
        float(row.lam) for row in result.rows
    ]
    assert list(frame["lambda_key"]) == [row.lam.key for row in result.rows]
    assert list(frame["score"]) == [row.score for row in result.rows]


def test_a_frame_without_pandas_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PaFastError, match="needs pandas") as caught:
        result.to_pandas()
    assert caught.value.hint == "pip install pandas"


class Recorded:
    def __init__(self) -> None:
        self.entries: list[JournalEntry] = []

    def recorded(self, entry: JournalEntry) -> None:
        self.entries.append(entry)


def test_a_progress_of_one_method_is_enough(tmp_path: Path) -> None:
    told = Recorded()
    result = run(tmp_path, "0,1", progress=told)
    assert [(entry.lam, entry.evaluator) for entry in told.entries] == [
        (row.lam.key, row.evaluator) for row in result.rows
    ]


@pytest.mark.parametrize("progress", [True, print, object()])
def test_a_progress_that_hears_nothing_is_refused(tmp_path: Path, progress: object) -> None:
    with pytest.raises(UsageError, match="hears nothing of a sweep"):
        run(tmp_path / "run", "0", progress=progress)
    assert not (tmp_path / "run").exists()

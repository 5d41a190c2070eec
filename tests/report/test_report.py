"""Reports: what the page and the tables say, from whatever a run folder holds."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from pa_fast.base import INSTRUCT, Engine, Score
from pa_fast.report import contents, write
from pa_fast.report.contents import RunReport
from pa_fast.report.page import page
from pa_fast.report.statistics import COLUMNS, _fixed, latex
from pa_fast.sweep import sweep
from pa_fast.sweep.journal import REPORT_FILES
from pa_fast.sweep.results import SweepResult
from tests.report import runs
from tests.sweep.fakes import FakeEngine, Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.made(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def report(folder: Path) -> RunReport:
    return RunReport.of(SweepResult.load(folder))


def shown(html: str) -> str:
    """The words of a page, without its scripts, styles and drawings."""
    bare = re.sub(r"(?s)<(script|style|svg).*?</\1>|<[^>]+>", " ", html)
    return " ".join(unescape(bare).split())


def test_the_page_begins_with_the_answer(report: RunReport) -> None:
    html, note = page([report])
    assert note is None
    words = shown(html)
    assert words.index(report.sentence) < words.index("Difference to λ = 1")
    for title in ("Two scores", "By task, at the chosen λ", "By λ", "Outputs that changed sides"):
        assert title in words
    assert len(html) < 5_000_000


def test_the_page_asks_nothing_of_a_network_and_runs_no_text_of_a_run(report: RunReport) -> None:
    html, _ = page([report])
    assert runs.HOSTILE not in html
    own = re.sub(r'(?s)<script type="module">.*?</script>', "", html, count=1)  # the library
    links = re.findall(r"""(?:src|href|url|import|fetch)\s*[=(:]\s*["']?(https?:[^"')\s]+)""", own)
    assert not [link for link in links if "www.w3.org" not in link]


def test_without_the_library_the_page_has_tables_and_says_so(
    report: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    html, note = page([report])
    assert note is not None and "pa_fast[report]" in note
    assert report.sentence in shown(html) and "<svg" not in html and "By task" in html


def test_figures_are_those_of_the_answer(report: RunReport) -> None:
    answer = report.answer
    assert answer is not None
    rows = {(row["evaluator"], row["key"]): row for row in report.differences()}
    held = answer.objective.difference(answer.chosen)
    row = rows["icl", answer.chosen.key]
    assert (row["diff"], row["low"], row["high"]) == (
        100 * held.value,
        100 * held.low,
        100 * held.high,
    )
    cost = answer.findings[2]
    assert rows["loss", "0"]["diff"] == cost.difference(cost.lams[0]).value * cost.scale
    by_task = list(report.tasks())
    assert [row["task"] for row in by_task[:5]] == ["all", *(f"task {k}" for k in range(4))]
    first = by_task[0]
    assert first["instruct"] == answer.objective.scores[-1] and first["n"] == 2000
    assert first["wins"] - first["losses"] == pytest.approx(2000 * held.value)
    assert first["truncated"] == 0.25 and first["ties"] == 10 / 2000


def test_changed_outputs_are_gains_then_losses(report: RunReport) -> None:
    changed = list(report.changed())
    assert report.answer is not None
    for name in ("icl", "loss"):
        mine = [item for item in changed if item["evaluator"] == name]
        assert 0 < len(mine) <= contents.MOST_CHANGED
        sides = [item["gained"] for item in mine]
        assert sides == sorted(sides, reverse=True) and set(sides) == {True, False}
        for item in mine:
            keys = [output["key"] for output in item["outputs"]]
            assert keys == ["0", report.answer.chosen.key, "1"]
            better = item["outputs"][1]["score"] - item["outputs"][2]["score"]
            assert (better > 0) == (item["gained"] == (name == "icl"))


def test_statistics_are_tidy_and_equal_for_equal_runs(folder: Path, tmp_path: Path) -> None:
    write(runs.loaded(folder))
    again = runs.made(tmp_path / "run")
    write(runs.loaded(again))
    for name in REPORT_FILES[1:]:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    rows = list(csv.DictReader((folder / "statistics.csv").open()))
    assert tuple(rows[0]) == COLUMNS
    # 11 λ × 2 references × (1 + 4 tasks) × 3 evaluators
    assert len(rows) == 11 * 2 * 5 * 3
    document = json.loads((folder / "statistics.json").read_text())
    assert document["answer"]["sentence"] == SweepResult.load(folder).answer().sentence
    assert document["evaluators"][0]["name"] == "icl"


def test_a_table_for_a_paper(folder: Path, report: RunReport) -> None:
    text = latex([report])
    assert text.startswith("\\begin{tabular}") and text.count("\\\\") == 2
    assert "run & " in text and "<script>" in text.replace("\\", "")
    body = text.splitlines()[4]
    assert not re.search(r"(?<!\\)[%#]|(?<!\\)_", body)


@pytest.mark.parametrize(
    ("value", "places", "sign", "shown"),
    [
        (0.8125, 3, "", "0.812"),
        (4.6875, 1, "+", "+4.7"),
        (-1.25, 0, "+", "-1"),
        (-0.004, 2, "+", "+0.00"),
        (12345.6, 0, "", "12346"),
        (1.5e9, 0, "", r"1.500 \times 10^{9}"),
        (-2.5e-9, 10, "+", r"-2.500 \times 10^{-9}"),
    ],
)
def test_digits_in_maths(value: float, places: int, sign: str, shown: str) -> None:
    assert _fixed(value, places, sign) == shown


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("n", [60, 2000])
def test_a_table_has_even_digits_that_fit_the_band(scale: float, n: int, tmp_path: Path) -> None:
    class Scaled(runs.Tasks):
        def __call__(self, engine: Engine) -> Score:
            score = super().__call__(engine)
            items = [replace(item, score=scale * (1 + item.score)) for item in score.items]
            return Score(scale * (1 + score.value), "x", score.n, items)

    sweep(FakeEngine(), "0,0.5,1", [Scaled("icl", n=n), runs.Tasks("a")], tmp_path, figure=False)
    row = latex([RunReport.of(SweepResult.load(tmp_path))]).splitlines()[4]
    assert not re.search(r"[0-9.]e[+-]?[0-9]", row) and "−" not in row
    gain = row.split(" & ")[4]
    digits = {len(number.partition(".")[2]) for number in re.findall(r"[+-]([0-9.]+)", gain)}
    assert "times" in gain or len(digits) == 1, gain


def test_several_runs_share_charts_and_tables(folder: Path, tmp_path: Path) -> None:
    other = runs.made(tmp_path / "other", shape="flat", n=300)
    reports = write(runs.loaded(folder, other))
    html = (folder / "report.html").read_text()
    words = shown(html)
    assert all(report.sentence in words for report in reports)
    assert html.count("data-chart aria") < 2 * (other / "report.html").read_text().count(
        "data-chart aria"
    )


def test_a_run_without_intervals_has_a_page(tmp_path: Path) -> None:
    class Bare(Scorer):
        def __call__(self, engine: Engine) -> Score:
            score = super().__call__(engine)
            return Score(score.value, score.unit, score.n)

    result = sweep(FakeEngine(), "0,0.5,1", [Bare("bare")], tmp_path, figure=False)
    [report] = write([result])
    assert "no interval can be given" in shown((tmp_path / "report.html").read_text())
    assert not list(report.differences()) and len(list(report.scores())) == 3


def test_a_run_without_points_has_none(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.stale = {0.0, 1.0}
    assert write([sweep(engine, "0,1", [Scorer("icl")], tmp_path, figure=False)]) == []
    assert not (tmp_path / "report.html").exists()


def test_one_λ_is_enough(tmp_path: Path) -> None:
    [report] = write([sweep(FakeEngine(), "0.5", [Scorer("icl")], tmp_path, figure=False)])
    assert "0.5" in report.sentence and (tmp_path / "report.html").exists()
    assert report.answer is not None and INSTRUCT not in report.answer.objective.lams


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]\n", b'{"id": 1}\n', b"\xff\n", b'{"score": "x", "id": 1}\n', b"[" * 10**5],
)
def test_outputs_that_are_none_are_left_out(tmp_path: Path, content: bytes) -> None:
    out = runs.made(tmp_path / "run", n=100, lambdas="0,0.5,1")
    for path in out.glob("outputs/*/outputs.jsonl"):
        path.write_bytes(content)
    assert not list(RunReport.of(SweepResult.load(out)).changed())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_noted(folder: Path) -> None:
    notes: list[str] = []
    folder.chmod(0o500)
    try:
        write(runs.loaded(folder), notes.append)
    finally:
        folder.chmod(0o700)
    assert "no report was written" in notes[0]


def test_many_λ_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    result = sweep(FakeEngine(), "0:1:1/400", [Scorer("icl")], tmp_path, figure=False)
    [report] = write([result])
    html = (tmp_path / "report.html").read_text()
    assert report.answer is not None
    left = report.answer.objective.left_out
    assert left > 250 and f"{left} λ are left out" in shown(html)
    assert len(list(report.scores())) == 401 - left

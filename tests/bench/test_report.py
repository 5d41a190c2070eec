"""bench/report.py: from tables to CSV, Markdown, the block of docs/benchmarks.md and the figure."""

from __future__ import annotations

import csv
import io
import pathlib
from dataclasses import replace
from typing import Any

import pytest

from bench import figure
from bench.cases import JOBS, OPS, SIZES, TARGETS
from bench.machine import Machine
from bench.report import BEGIN, END, GPU, PAGE, Report, put, update
from pa_fast.throughput.harness import Table, Way

pytestmark = pytest.mark.draws

MACHINE = Machine(
    "cpu-2-cores", "A CPU | with a bar", "Python 3.12, torch 2.13.0", "abc1234", "2026-11-21"
)
MERGE = Table(
    "P7",
    "merge, 1.06 G weights",
    (
        Way("cp", seconds=(1.0, 3.0), cpu_s=0.5, moved_bytes=4_000_000_000),
        Way("merge", seconds=(4.0,)),
        Way("merge, again", seconds=(5.0,)),
    ),
    "cp",
    JOBS["merge"].goal,
    "2 × `cp`",
)
SWEEP = Table(
    "P6",
    "sweep of 11 λ, 1.06 G bf16 weights",
    tuple(
        Way(name, seconds=seconds)
        for name, seconds in zip(
            figure.WAYS, ((0.3, 0.31, 0.29), (2.9, 2.7, 2.8), (12.1, 11.4, 12.6))
        )
    ),
    figure.OURS,
    JOBS["sweep"].goal,
    "1/40",
)
FOUND = Report(MACHINE, "1b", [SWEEP, MERGE], ["lerp"], ["workers: ray is not installed"])


def write_run(path: pathlib.Path, *tables: Table, **changes: Any) -> pathlib.Path:
    run = Report(MACHINE, "1b", list(tables), json=path)
    for name, value in changes.items():
        setattr(run, name, value)
    run.write()
    return path


def test_runs_are_read_in_the_order_of_the_promises_and_the_last_of_a_case_counts(
    tmp_path: pathlib.Path,
) -> None:
    first = write_run(
        tmp_path / "a.json",
        replace(MERGE, headline="old"),
        Table("", "checksum", MERGE.ways, "cp"),
        failed=["t"],
    )
    second = write_run(tmp_path / "b.json", MERGE, SWEEP, skipped=["u: no ray"])
    found = Report.read([first, second])
    assert [(table.target, table.headline) for table in found.tables] == [
        ("P6", "1/40"),
        ("P7", "2 × `cp`"),
        ("", ""),
    ]
    assert found.failed == ["t"] and found.skipped == ["u: no ray"] and found.machine == MACHINE


def test_the_csv_has_a_row_for_each_way_with_its_ratio_and_the_noise() -> None:
    rows = list(csv.DictReader(io.StringIO(FOUND.csv())))
    assert len(rows) == 6
    cp, merge = (next(row for row in rows if row["way"] == name) for name in ("cp", "merge"))
    assert (cp["median_s"], cp["lowest_s"], cp["gbps"], cp["rounds"]) == ("2", "1", "2", "2")
    assert (merge["against"], merge["ratio"], merge["noise_ratio"], merge["moved_bytes"]) == (
        "cp",
        "2",
        "1.250",
        "",
    )
    assert (merge["commit"], merge["goal"], merge["headline"]) == (
        "abc1234",
        JOBS["merge"].goal,
        "2 × `cp`",
    )


def test_every_promise_has_a_row_and_what_needs_a_gpu_says_so() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in FOUND.promises().splitlines()[2:]
    ]
    assert [row[0] for row in rows if row[3] == GPU] == ["P1", "P2", "P3", "P4", "P6", "P12"]
    assert {row[0] for row in rows} == set(TARGETS)
    assert [row[3:] for row in rows if row[0] == "P7"] == [["2 × `cp`", "1.250"]]
    assert [row[3] for row in rows if row[0] == "P9"] == ["not measured in this run"]
    assert "P7   merge, 1.06 G weights\n       goal: ≤ 2 × `cp` and `sync`" in FOUND.summary()


def test_the_markdown_names_what_failed_and_gives_it_no_speed(tmp_path: pathlib.Path) -> None:
    table, text = replace(FOUND, folder=tmp_path).write()
    assert (
        table.name == "2026-11-21-cpu-2-cores-1b.csv"
        and text.name == "2026-11-21-cpu-2-cores-1b.md"
    )
    said = text.read_text()
    assert (
        "Failed, so without a speed:\n- lerp" in said
        and "Skipped:\n- workers: ray is not installed" in said
    )
    assert "| merge | 4.00 s | 4.00 s | 2 |" in said


def test_tables_are_on_disk_when_they_are_there_and_an_earlier_run_stays(
    tmp_path: pathlib.Path,
) -> None:
    for number, name in enumerate(("2026-11-21-cpu-2-cores-1b", "2026-11-21-cpu-2-cores-1b-2")):
        run = Report(MACHINE, "1b", folder=tmp_path, json=tmp_path / "run.json")
        for count, table in enumerate((MERGE, SWEEP, replace(MERGE, headline="3 × `cp`"))):
            run.add(table)
            rows = list(csv.DictReader((tmp_path / f"{name}.csv").open(encoding="utf-8")))
            assert len(rows) == (3, 6, 6)[count]
        assert {row["headline"] for row in rows} == {"1/40", "3 × `cp`"}
        run.note("merge: a sentence")
        assert "Notes:\n- merge: a sentence" in (tmp_path / f"{name}.md").read_text()
        assert len(list(tmp_path.iterdir())) == 2 * number + 3, "no half-written file is left"


def test_a_rehearsal_shows_no_figure_and_writes_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Report(MACHINE, "tiny", rehearsal=True)
    run.add(MERGE)
    run.note("merge: 3 × as fast")
    printed = capsys.readouterr().out
    assert "P7: merge, 1.06 G weights: merge, again" in printed
    assert "not judged in a rehearsal" in printed and "merge: a note on what was timed" in printed
    assert "4.00 s" not in printed and "as fast" not in printed and run.write() == []


def test_a_gpus_run_judges_the_goals_of_a_gpu() -> None:
    gpu = replace(MACHINE, kind="nvidia-h200", tests="93 passed")
    copy = Table(
        "P1", "switch", MERGE.ways, "cp", "≥ 97 %", "98 %", met=True, ceilings={"copy": 4.0}
    )
    run = Report(gpu, "8b", [copy])
    assert "| P1 | switch | ≥ 97 % | 98 %: met | 1.250 |" in run.promises()
    assert (
        "| P4 | switch from host memory | ≥ 90 %" in run.promises() and "P13" not in run.promises()
    )
    assert GPU not in run.promises() and "93 passed" in run.where()
    first = next(csv.DictReader(io.StringIO(run.csv())))
    assert (first["of_copy"], first["of_stream"], first["met"]) == ("0.5", "", "True")


def test_the_block_is_put_between_its_markers_and_again_in_place(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update(FOUND, page)
    once = page.read_text()
    assert (
        once.startswith(f"before\n{BEGIN}\n| ")
        and once.endswith(f"\n{END}\nafter\n")
        and "old" not in once
    )
    assert (
        "(images/per_lambda.png)" in once
        and (tmp_path / "images/per_lambda.png").stat().st_size > 5000
    )
    update(FOUND, page)
    assert page.read_text() == once


def test_without_a_sweep_there_is_no_figure(tmp_path: pathlib.Path) -> None:
    assert not figure.write([MERGE], tmp_path / "none") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_a_page_without_its_markers_is_not_written(text: str) -> None:
    with pytest.raises(ValueError, match="bench:begin"):
        put(text, "block")


def test_the_page_has_its_markers() -> None:
    assert put(PAGE.read_text(encoding="utf-8"), "block").count("block") >= 1


def test_every_case_belongs_to_a_promise_and_has_every_size_that_can_be_asked_for() -> None:
    for case in (*OPS.values(), *JOBS.values()):
        assert case.target in {"", *TARGETS} and len(case.sizes) == len(SIZES)
    measured = {case.target for case in (*OPS.values(), *JOBS.values())} - {""}
    assert measured == {name for name, target in TARGETS.items() if target.goal}

"""bench/report.py: from pytest-benchmark's JSON to CSV, Markdown, the block of
docs/benchmarks.md and the figure."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from dataclasses import asdict, replace
from typing import Any

import pytest

from bench import figure
from bench.cases import JOBS, OPS, SIZES, TARGETS
from bench.machine import Machine
from bench.report import BEGIN, END, GPU, PAGE, Report, put, update
from bench.table import KEY, Table, Way

MACHINE = Machine(
    "cpu-2-cores", "A CPU | with a bar", "Python 3.12, torch 2.13.0", "abc1234", "2026-11-21"
)
MERGE = Table(
    "P7",
    "merge, 1.06 G weights",
    (Way("cp", (1.0, 3.0), 0.5, 4_000_000_000), Way("merge", (4.0,)), Way("merge, again", (5.0,))),
    "cp",
    JOBS["merge"].goal,
    "2 × `cp`",
    ("merge", "merge, again"),
)
SWEEP = Table(
    "P6",
    "sweep of 11 λ, 1.06 G bf16 weights",
    tuple(
        Way(name, seconds)
        for name, seconds in zip(
            figure.WAYS, ((0.3, 0.31, 0.29), (2.9, 2.7, 2.8), (12.1, 11.4, 12.6))
        )
    ),
    figure.OURS,
    JOBS["sweep"].goal,
    "1/40",
)
FOUND = Report(
    MACHINE, "1b", (SWEEP, MERGE), ("bench/test_lerp.py::test_lerp",), ("bench/test_x.py: no ray",)
)


def write_run(path: pathlib.Path, *tables: Table, **changes: Any) -> pathlib.Path:
    run = {"machine": asdict(MACHINE), "size": "1b", "failed": [], "skipped": {}, **changes}
    benchmarks = [
        {"name": "one", "extra_info": {KEY: [asdict(table) for table in tables]}},
        {"name": "two", "extra_info": {}},
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks, "run": run}))
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
    second = write_run(tmp_path / "b.json", MERGE, SWEEP, skipped={"u": "no ray"})
    found = Report.read([first, second])
    assert [(table.target, table.headline) for table in found.tables] == [
        ("P6", "1/40"),
        ("P7", "2 × `cp`"),
        ("", ""),
    ]
    assert found.failed == ("t",) and found.skipped == ("u: no ray",) and found.machine == MACHINE


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
    assert "P7   merge, 1.06 G weights\n       goal: ≤ 3 × `cp`" in FOUND.summary()


def test_the_markdown_names_what_failed_and_gives_it_no_speed(tmp_path: pathlib.Path) -> None:
    table, text = FOUND.write(tmp_path)
    assert (
        table.name == "2026-11-21-cpu-2-cores-1b.csv"
        and text.name == "2026-11-21-cpu-2-cores-1b.md"
    )
    said = text.read_text()
    assert (
        "Failed, so without a speed:\n- bench/test_lerp.py::test_lerp" in said
        and "Skipped:\n- bench/test_x.py" in said
    )
    assert "| merge | 4.00 s | 4.00 s | 2 |" in said


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

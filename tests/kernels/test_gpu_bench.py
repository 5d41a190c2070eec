"""What `make gpu` does where there is no GPU: every stage's code at tiny sizes, and the parts that
read and write text."""

from __future__ import annotations

import csv
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pa_kernels import Lerp, dense_triton, offline
from pa_kernels.tiles import INTERPRETED, Launch

from bench.gpu.__main__ import NAMES
from bench.gpu.ledger import Ledger, Row
from bench.gpu.pairs import Pair
from bench.gpu.proof import SAMPLE, WrongBits, spots
from bench.gpu.run import Contender, Run
from bench.gpu.scale import FULL, TINY
from bench.gpu.stages import STAGES, Stage, perform
from bench.gpu.tools import METRICS, counters

ROOT = pathlib.Path(__file__).parents[2]


BF16 = (torch.bfloat16,) * 3

SLOW = ("sweep", "sanitize", "first", "graph", "checksum", "sparse", "stochastic")
"""Seconds each of them: they are walked through with everything else by `make gpu` and `make
test-slow`."""


@pytest.mark.parametrize(
    "names",
    [[name for name in NAMES if name not in SLOW], pytest.param(NAMES, marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
def test_a_rehearsal_walks_through_every_stage_and_writes_nothing(names: list[str]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    results = ROOT / "bench" / "results"
    before = sorted(results.glob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse", "--only", ",".join(names)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "nothing timed on a GPU, nothing written" in done.stdout
    assert "GB/s" not in done.stdout and " ms" not in done.stdout, "a rehearsal shows no figure"
    for name in names:
        assert re.search(rf"^{name}\b.*whole stage$", done.stdout, re.MULTILINE), name
    for target in ("P1", "P2", "P3", "P4", "P12") + (("P6",) if "sweep" in names else ()):
        assert re.search(rf"^{target}: .*not judged", done.stdout, re.MULTILINE), target
    assert sorted(results.glob("*")) == before


def test_every_stage_can_be_named() -> None:
    assert [stage.name for stage in STAGES] == list(NAMES)


def run_of(folder: pathlib.Path) -> Run:
    return Run(torch.device("cpu"), Ledger(folder / "made" / "rows.csv", {"gpu": "none"}), TINY)


def test_rows_are_on_disk_when_they_are_there(tmp_path: pathlib.Path) -> None:
    run = run_of(tmp_path)
    run.copy_gbps, run.stream_gbps = 10.0, 20.0
    seconds = iter([0.002, 0.004])
    run.time(
        "lerp",
        {"a": Contender(8_000_000, lambda: None, switches=2)},
        1,
        "a",
        clock=lambda work: next(seconds),
    )
    with run.ledger.path.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    # 2 ms for 2 switches of 8 MB
    assert (row["gpu"], row["stage"], row["what"]) == ("none", "lerp", "a")
    assert [float(row[name]) for name in ("ms", "gbps", "of_copy", "of_stream", "ratio")] == [
        1.0,
        8.0,
        0.8,
        0.4,
        1.0,
    ]
    run.ledger.verdict("lerp", "P1", "≥ 97 %", "98 %", True)
    assert "| P1: ≥ 97 % | 98 % | yes |" in run.ledger.write_markdown().read_text(encoding="utf-8")
    Ledger(run.ledger.path, {"gpu": "none"}).say("lerp", "another run")
    assert run.ledger.path.read_text(encoding="utf-8").count("moved_bytes") == 1


@pytest.mark.parametrize(
    ("again", "best", "verdict"),
    [(1.001, 0.98, "change"), (1.02, 0.98, "keep"), (1.001, 0.995, "keep")],
)
def test_a_default_changes_only_for_more_than_the_noise(
    tmp_path: pathlib.Path, again: float, best: float, verdict: str
) -> None:
    run = run_of(tmp_path)
    rows = {
        name: Row("s", name, ms=ms)
        for name, ms in {"now": 1.0, "now, again": again, "x": best, "y": 1.5}.items()
    }
    assert run.choose("s", rows, "now", ["x", "y"], "SETTING") == "x"
    assert run.ledger.rows[-1].note.startswith(f"{verdict} SETTING: x is")


def test_wrong_bits_are_found_and_end_the_run(tmp_path: pathlib.Path) -> None:
    run = run_of(tmp_path)
    pair = Pair.random(run, [5, 3 * SAMPLE + 7])
    Lerp(pair.out, pair.base, pair.inst).run_(0.25)
    pair.prove("right", 0.25)
    for at in (0, 4, 5, pair.count - 1):
        kept = pair.w[at].clone()
        pair.w[at] = 9
        with pytest.raises(WrongBits, match=r"element \d+ is 9\.0"):
            pair.prove("wrong", 0.25)
        pair.w[at] = kept

    def wrong(run: Run) -> None:
        raise WrongBits("x")

    def fails(run: Run) -> None:
        raise ValueError("no room")

    ran: list[str] = []
    stages = (
        Stage("ceilings", lambda run: ran.append("ceilings"), 0),
        Stage("a", fails, 0),
        Stage("b", wrong, 0),
    )
    stages += (Stage("c", lambda run: ran.append("c"), 0),)
    assert perform(run, ["a", "b", "c"], stages) == ["a", "b"] and ran == ["ceilings"]
    assert perform(run, ["a", "c"], stages) == ["a"] and ran == ["ceilings", "ceilings", "c"]


def test_a_stage_begins_only_if_it_can_be_done(tmp_path: pathlib.Path) -> None:
    run, ran = run_of(tmp_path), []
    run.until = 0.0
    assert perform(run, ["a"], (Stage("a", lambda run: ran.append("a"), 5),)) == [] and not ran
    assert "left out: it takes about 5 s" in run.ledger.rows[-1].note


def test_spots_reach_every_end() -> None:
    sizes = [10, 1, 4 * SAMPLE, 5 * SAMPLE + 3]
    found = list(spots(sizes))
    assert {t for t, _ in found} == {0, 1, 3}
    for t in (0, 1, 3):
        assert min(span.start for at, span in found if at == t) == 0
        assert max(span.stop for at, span in found if at == t) == sizes[t]
    assert all(span.start % SAMPLE == 0 and span.stop > span.start for _, span in found)


def test_the_model_is_llama_8b() -> None:
    assert sum(FULL.sizes(FULL.layers)) == 8_030_261_248
    assert FULL.layers_for(1 << 60, 6) == 32 and FULL.layers_for(0, 6) == 0
    one = sum(FULL.sizes(1))
    assert FULL.layers_for(6 * one, 6) == 1 and FULL.layers_for(6 * one - 6, 6) == 0


def test_counters_are_read_from_what_ncu_prints() -> None:
    names = list(METRICS)
    head = (
        '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    )
    rows = [
        f'"0","7","dense_kernel","Command line profiler metrics","{name}","%","9{n},1"'
        for n, name in enumerate(names[:2])
    ]
    printed = "\n".join(
        ["==PROF== Connected", "words of the program, too", head, *rows, "==PROF== Disconnected"]
    )
    assert counters(printed) == {METRICS[names[0]]: "90,1 %", METRICS[names[1]]: "91,1 %"}
    assert counters("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission") == {}


@pytest.mark.skipif(INTERPRETED, reason="kernels do not compile in a process that interprets them")
@pytest.mark.parametrize(
    "launches",
    [dense_triton.CANDIDATES[::4], pytest.param(dense_triton.CANDIDATES, marks=pytest.mark.slow)],
    ids=["every fourth", "all"],
)
def test_what_may_become_a_default_neither_spills_nor_falls_to_narrow_accesses(
    launches: Sequence[Launch],
) -> None:
    from bench.gpu.persistent import persistent_kernel

    for launch in launches:
        kernel = offline.dense(BF16, launch=launch)
        assert full_width(kernel), launch
    stays = replace(offline.dense(BF16), name="stays", function=persistent_kernel)
    assert full_width(stays)


def full_width(kernel: offline.Kernel) -> bool:
    made = offline.compile_for(kernel, "sm_90")
    return (
        made.spills == 0
        and made.bytes_per_element == kernel.bytes_per_element
        and made.registers < 100
    )

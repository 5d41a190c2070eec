"""What `make gpu` does where there is no GPU: every stage's code at tiny sizes, and the parts that
read and write text."""

from __future__ import annotations

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

from bench.gpu.__main__ import STAGES
from bench.gpu.run import GpuRun
from bench.gpu.scale import FULL, TINY
from bench.gpu.tools import METRICS, counters
from bench.machine import Machine
from bench.pairs import FlatPair
from bench.report import Report
from bench.run import Run, Skip, Stage, perform
from pa_fast.throughput.harness import SPOT, Way, WrongBits

ROOT = pathlib.Path(__file__).parents[2]


BF16 = (torch.bfloat16,) * 3

SLOW = ("sweep", "sanitize", "first", "graph", "checksum", "sparse", "stochastic")
"""Seconds each of them: they are walked through with everything else by `make gpu` and `make
test-slow`."""


@pytest.mark.parametrize(
    "names",
    [
        [name for name in STAGES if name not in SLOW],
        pytest.param([*STAGES], marks=pytest.mark.slow),
    ],
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


def test_every_stage_is_there() -> None:
    for name, (place, needs_s) in STAGES.items():
        module, function = place.split(":")
        source = (ROOT / "bench" / "gpu" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {function}(run: GpuRun)" in source and needs_s > 0, name


@pytest.fixture
def run() -> GpuRun:
    report = Report(Machine("none", "none", "", "", "2026-11-21"), "tiny")
    return GpuRun(report, scale=TINY)


@pytest.mark.parametrize(
    ("again", "best", "verdict"),
    [(1.001, 0.98, "change"), (1.02, 0.98, "keep"), (1.001, 0.995, "keep")],
)
def test_a_default_changes_only_for_more_than_the_noise(
    run: GpuRun, again: float, best: float, verdict: str
) -> None:
    seconds = {"now": 1.0, "now, again": again, "x": best, "y": 1.5}
    ways = {name: Way(name, seconds=(value,)) for name, value in seconds.items()}
    run.stage = "s"
    assert run.choose(ways, "now", ["x", "y"], "SETTING") == "x"
    assert run.report.notes[-1].startswith(f"s: {verdict} SETTING: x is")


def test_wrong_bits_are_found_and_end_the_run(run: GpuRun) -> None:
    pair = FlatPair.random(run, [5, 3 * SPOT + 7])
    Lerp(pair.out, pair.base, pair.inst).run_(0.25)
    pair.check("right", 0.25)
    for at in (0, 4, 5, pair.count - 1):
        kept = pair.w[at].clone()
        pair.w[at] = 9
        with pytest.raises(WrongBits, match=r"element \d+ is 9\.0"):
            pair.check("wrong", 0.25)
        pair.w[at] = kept

    def wrong(run: Run) -> None:
        raise WrongBits("x")

    def fails(run: Run) -> None:
        raise ValueError("no room")

    def skips(run: Run) -> None:
        raise Skip("no tool")

    ran: list[str] = []
    stages = [Stage("ceilings", lambda run: ran.append("ceilings")), Stage("a", fails)]
    stages += [Stage("s", skips), Stage("b", wrong), Stage("c", lambda run: ran.append("c"))]
    assert perform(run, stages) == ["a", "b"] and ran == ["ceilings"]
    assert run.report.skipped == ["s: no tool"]
    assert run.report.notes == [
        "a: failed: ValueError: no room",
        "b: failed: WrongBits: x",
        "b: wrong bits: nothing further is timed",
    ]


def test_a_stage_begins_only_if_it_can_be_done(run: GpuRun) -> None:
    ran: list[str] = []
    run.until = 0.0
    assert perform(run, [Stage("a", lambda run: ran.append("a"), 5)]) == [] and not ran
    assert "a: left out: it takes about 5 s" in run.report.notes[-1]


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

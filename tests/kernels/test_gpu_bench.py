"""What `make gpu` does where there is no GPU: every stage's code at tiny sizes, and the parts that
read and write text."""

from __future__ import annotations

import argparse
import csv
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pa_kernels import Lerp, dense_triton, offline
from pa_kernels.tiles import INTERPRETED, Launch

from bench.gpu import __main__ as command_line
from bench.gpu.plan import CALLS, MINUTES, STAGES, TESTS, groups_of, plan
from bench.gpu.run import GpuRun
from bench.gpu.scale import FULL, TINY
from bench.gpu.tools import METRICS, PIPES, counters
from bench.machine import Machine
from bench.pairs import FlatPair
from bench.report import Report
from bench.run import Run, Skip, Stage, perform
from bench.suite import run_limited
from pa_fast.throughput.harness import SPOT, Way, WrongBits, by_events
from tests import patience

ROOT = pathlib.Path(__file__).parents[2]


BF16 = (torch.bfloat16,) * 3

SLOW = ("sanitize", "first", "graph", "checksum", "recorded", "sparse", "stochastic", "sweep")
"""Seconds each of them, and of `sweep` transformers to load: they are walked through with all
others by `make gpu` and `make test-slow`."""


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "OMP_NUM_THREADS": "1",
}


ABSENT = 'import sys; sys.modules["pa_fast.stats"] = None'
"""What needs scipy, which a machine that is lent may not have: `make gpu` installs nothing."""


def rehearsal(names: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "--rehearse", "--only", names, *options]


@pytest.mark.parametrize(
    ("names", "apart"),
    [
        ([name for name in STAGES if name not in SLOW], ["--one-process"]),
        pytest.param([*STAGES], [], marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_a_rehearsal_walks_through_every_stage_and_writes_nothing(
    names: list[str], apart: list[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    pytest.importorskip("triton", reason="Triton is not installed")
    results = ROOT / "bench" / "results"
    before = sorted(results.glob("*"))
    done = subprocess.run(
        rehearsal(",".join(names), *apart),
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"},
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
    for name, stage in STAGES.items():
        module, function = stage.place.split(":")
        source = (ROOT / "bench" / "gpu" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {function}(run: GpuRun)" in source and stage.needs_s > 0, name
        assert {*stage.tests} <= {*TESTS}, name


def test_every_stage_is_in_one_call_that_has_time_for_it() -> None:
    shared = [name for call in CALLS for name in call.stages]
    assert sorted([*shared, "ceilings"]) == sorted(STAGES)
    assert all(call.needs_s <= 60 * MINUTES for call in CALLS)
    printed = "\n".join(plan())
    for number, call in enumerate(CALLS, 1):
        assert f"--only {','.join(call.stages)} --minutes {MINUTES:g}" in printed
        assert f"tee $OUT/call-{number}.log" in printed
    assert "PA_FAST_COMMIT=" in printed


def test_every_test_for_a_gpu_belongs_to_a_group() -> None:
    """A file that says `gpu` or `triton` is in a group; the two files that groups share are cut
    into complements."""
    marked = {
        str(path.relative_to(ROOT / "tests"))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.(gpu|triton)\b(?!\W+runs)", path.read_text(encoding="utf-8"))
        and path != pathlib.Path(__file__)
    }
    assert marked == {path for group in TESTS.values() for path in group.paths}
    assert groups_of(["packed", "lerp"]) == ["dense", "packed"] and groups_of(["sanitize"]) == []


@pytest.mark.slow
def test_the_groups_leave_no_test_out() -> None:
    def collected(paths: Sequence[str], only: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", *paths]
            + ["-m", "(gpu or triton) and not slow", "-k", only],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        return {line for line in done.stdout.splitlines() if "::" in line}

    found: set[str] = set()
    for group in TESTS.values():
        found |= collected([f"tests/{path}" for path in group.paths], group.only)
    assert found == collected(["tests"], "test") and found


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


def test_wrong_bits_are_found_and_end_their_stage_alone(run: GpuRun) -> None:
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
    assert perform(run, stages) == ["a", "b"] and ran == ["ceilings", "c"]
    assert run.report.skipped == ["s: no tool"]
    assert run.report.notes == [
        "a: failed: ValueError: no room",
        "b: failed: WrongBits: x",
    ]


BROKEN = """
import sys
if "bench.gpu.stage" in sys.orig_argv:
    from bench.gpu import checksum, graph, host, stochastic
    from pa_fast.throughput.harness import WrongBits
    def wrong(run):
        raise WrongBits("one wrong bit")
    host.host = wrong
    def dies(run):
        import os, signal
        run.note("about to fault")
        os.kill(os.getpid(), signal.SIGSEGV)
    graph.graph = dies
    def hangs(run):
        run.note("about to hang")
        import time
        time.sleep(600)
    stochastic.stochastic = hangs
"""
"""What a wrong kernel, one that faults and one that hangs do to the process of their stage."""


@pytest.mark.slow
def test_a_stage_that_is_wrong_or_dies_leaves_the_others_alone(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    done = subprocess.run(
        rehearsal("host,graph,lerp", "--out", str(tmp_path / "out")),
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rehearsal: FAILED in host, graph" in done.stdout
    assert "WrongBits: one wrong bit" in done.stdout
    rows = list(csv.DictReader(next((tmp_path / "out").glob("*.csv")).open(encoding="utf-8")))
    assert {row["target"] for row in rows} == {"", "P1", "P2"}, "ceilings and lerp"


def test_a_run_goes_on_where_a_stage_dies_and_leaves_its_rows_where_it_is_killed(
    tmp_path: pathlib.Path,
) -> None:
    """One stage faults, and the next hangs until the whole run is killed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    out = tmp_path / "out"
    with subprocess.Popen(
        rehearsal("graph,stochastic", "--out", str(out)),
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None
        printed: list[str] = []
        for line in started.stdout:
            printed.append(line.partition(":")[0])
            if "stochastic: a note" in line:
                break
        # its own, and what the run has to say of its end
        assert printed.count("graph") == 2, printed
        assert printed[-1] == "stochastic", "it never got there"
        for pid in [started.pid, *patience.descendants(started.pid)]:
            os.kill(pid, signal.SIGKILL)
    assert started.returncode == -signal.SIGKILL
    rows = list(csv.DictReader(next(out.glob("*.csv")).open(encoding="utf-8")))
    assert {row["way"] for row in rows} >= {"device copy", "flat torch.add", "flat torch.lerp"}
    assert not any(row["median_s"] or row["gbps"] or row["met"] for row in rows)


def test_a_stage_is_stopped_after_its_limit_with_all_that_it_started(
    tmp_path: pathlib.Path,
) -> None:
    kept = tmp_path / "pid"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    program = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    )
    command = [sys.executable, "-c", program, child, str(kept)]
    assert run_limited(command, 5.0, os.environ) == (None, "")
    pid, ends = int(kept.read_text()), time.monotonic() + 30
    while is_running(pid) and time.monotonic() < ends:
        time.sleep(0.05)  # a killed process is gone a moment later
    assert not is_running(pid)
    assert run_limited([sys.executable, "-c", "print(7)"], 60, os.environ) == (0, "7\n")


def is_running(pid: int) -> bool:
    """Whether the process still runs: one that nobody has reaped does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def tests_that_fail(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that pytest was asked for, by a run whose tests of packed switches fail."""
    asked: list[str] = []

    def passed(*arguments: str, **options: object) -> str:
        asked.extend(one for one in arguments if one.startswith("tests/"))
        return "" if "tests/kernels/test_packed_triton.py" in arguments else "5 passed"

    monkeypatch.setattr(command_line, "tests_passed", passed)
    return asked


def test_a_failing_test_of_one_kernel_leaves_the_timing_of_others_alone(
    tests_that_fail: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(command_line, "run_stage", lambda name, state, **how: timed.append(name))
    suite = command_line.Suite(rehearsal=True, until=math.inf)
    options = argparse.Namespace(out=tmp_path / "out", one_process=True)
    names = ["ceilings", "lerp", "packed", "encode", "sparse"]
    assert command_line.time_all(names, suite, tmp_path / "run.json", options) == 1
    assert timed == ["ceilings", "lerp", "sparse"]
    assert str(suite) == "dense 5 passed, packed FAILED, sparse 5 passed"
    assert tests_that_fail.count("tests/kernels/test_packed_triton.py") == 1, "each group once"
    run = Report.read([tmp_path / "run.json"])
    assert run.notes[-1] == "encode: not timed: the tests of packed did not pass"


def test_tests_count_towards_the_time_that_a_stage_needs(
    tests_that_fail: list[str], tmp_path: pathlib.Path
) -> None:
    needs_s = STAGES["sparse"].needs_s + TESTS["dense"].needs_s
    suite = command_line.Suite(rehearsal=True, until=time.monotonic() + needs_s)
    options = argparse.Namespace(out=None, one_process=True)
    assert command_line.time_all(["sparse"], suite, tmp_path / "run.json", options) == 0
    assert not tests_that_fail, "there is no time for the tests of sparse sets"


def test_work_is_on_the_device_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what the host takes to launch is not counted."""
    did: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            did.append("event")

        def synchronize(self) -> None:
            did.append("waited")

        def elapsed_time(self, end: Event) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: did.append(f"busy {cycles > 10**6}"))
    assert by_events(lambda: did.append("work")).wall_s == 1.5
    assert did == ["busy True", "event", "work", "event", "waited"]


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
    assert [name.split("_pipe_")[1].split(".")[0] for name in PIPES] == ["alu", "fma", "xu"]
    assert {*PIPES} < {*METRICS}
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

"""Merge to disk (P7) beside `cp` of one checkpoint and mergekit: warm cache, interleaved, processor time beside wall time.

`PA_FAST_BENCH_SIZE=1b make bench` for the README's figures (8 GB of disk; 3b takes 25 GB); 300m by default. mergekit runs in an
environment of its own, which `python -m bench.peers` makes; without it that row is missing, and the table says so.
"""

from __future__ import annotations

import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import pa_fast
from bench import peers
from bench.synthetic import write_pair

LAM = 0.6
ROUNDS = int(os.environ.get("PA_FAST_BENCH_ROUNDS", "5"))
MERGEKIT_OPTIONS = ("-j", str(os.cpu_count()), "--async-write", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")


@dataclass(frozen=True)
class Run:
    """Wall seconds, processor seconds, and the most anonymous memory seen (every 10 ms) where it is a process."""

    wall_s: float
    cpu_s: float
    anonymous_mb: float | None = None


def test_merge(benchmark: Any, capsys: Any, tmp_path: pathlib.Path) -> None:
    size = os.environ.get("PA_FAST_BENCH_SIZE", "300m")
    base, instruct = write_pair(tmp_path, size)
    out = tmp_path / "out"
    ours = pathlib.Path(sys.executable).with_name("pa-fast")
    ways: dict[str, Callable[[], Run]] = {
        "cp": lambda: process("cp", "-r", base, out),
        "merge": lambda: here(lambda: pa_fast.merge(base, instruct, LAM, out)),
        "merge again": lambda: here(lambda: pa_fast.merge(base, instruct, LAM, out)),
        "pa-fast merge": lambda: process(ours, "merge", base, instruct, "--lambda", LAM, "--out", out),
        "pa-fast --version": lambda: process(ours, "--version"),
    }
    program = peers.mergekit()
    if program:
        ways["mergekit"] = lambda: process(program, mergekit_config(tmp_path, base, instruct), out, *MERGEKIT_OPTIONS)
    pa_fast.merge(base, instruct, LAM, out)
    assert pa_fast.verify(out, base, instruct).ok, "wrong bits: no speed is printed"
    bytes_ = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            runs[name].append(run())
            shutil.rmtree(out, ignore_errors=True)
    with capsys.disabled():
        where = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"\nmerge of {bytes_ / 2e9:.2f} G bf16 weights, {ROUNDS} rounds, {where}")
        if program:
            print(f"  {peers.versions(program)}; {' '.join(MERGEKIT_OPTIONS)}")
        else:
            print("  mergekit is not here: python -m bench.peers installs it")
        print(f"  {'median of':20}{'wall':>9} {'lowest':>9} {'× cp':>7}{'processor':>11} {'× cp':>7}   anonymous")
        floor = middle(runs["cp"])
        for name, values in runs.items():
            found = middle(values)
            lowest = min(run.wall_s for run in values)
            memory = f"{found.anonymous_mb:9.0f} MB" if found.anonymous_mb else ""
            print(
                f"  {name:20}{found.wall_s:7.2f} s {lowest:7.2f} s {found.wall_s / floor.wall_s:7.2f}"
                f"{found.cpu_s:9.2f} s {found.cpu_s / floor.cpu_s:7.2f} {memory}"
            )
            benchmark.extra_info[name] = vars(found)
        if program:
            whole, theirs = middle(runs["pa-fast merge"]), middle(runs["mergekit"])
            print(
                f"  mergekit / pa-fast merge: {theirs.wall_s / whole.wall_s:.2f} wall, {theirs.cpu_s / whole.cpu_s:.2f} processor"
            )
    benchmark.pedantic(lambda: shutil.rmtree(out, ignore_errors=True) or pa_fast.merge(base, instruct, LAM, out), rounds=1)


def middle(runs: list[Run]) -> Run:
    peaks = [run.anonymous_mb for run in runs if run.anonymous_mb is not None]
    return Run(
        statistics.median(run.wall_s for run in runs),
        statistics.median(run.cpu_s for run in runs),
        max(peaks) if peaks else None,
    )


def process(*command: object) -> Run:
    """A command from start to end."""
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=said)
        most, status_file = 0.0, pathlib.Path(f"/proc/{child.pid}/status")
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            # the system's own high-water mark begins with that of the process that forked
            held = [line.split()[1] for line in status_file.read_text().splitlines() if line.startswith("RssAnon")]
            most = max(most, *(int(kb) / 1024 for kb in held), 0.0)
            time.sleep(0.01)
        wall_s = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        assert child.returncode == 0, said.read().decode()
    return Run(wall_s, usage.ru_utime + usage.ru_stime, most)


def here(work: Callable[[], object]) -> Run:
    """Work in this process, its imports done."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return Run(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def mergekit_config(folder: pathlib.Path, base: pathlib.Path, instruct: pathlib.Path) -> pathlib.Path:
    """The same merge as mergekit's `linear`, which is its fastest method for it."""
    file = folder / "mergekit.yml"
    file.write_text(
        "merge_method: linear\ndtype: bfloat16\nparameters: {normalize: false}\nmodels:\n"
        f"- {{model: {base}, parameters: {{weight: {1 - LAM}}}}}\n- {{model: {instruct}, parameters: {{weight: {LAM}}}}}\n"
    )
    return file

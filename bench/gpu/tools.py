"""NVIDIA's own tools on our kernels, where the machine has them and lets them: ncu's counters,
compute-sanitizer's checks."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence

import torch

from bench.gpu.exercise import exercise
from bench.gpu.profiled import KERNELS, LAUNCHES, profiled
from bench.gpu.run import GpuRun
from bench.machine import ROOT
from bench.run import Skip

PIPES = {
    f"sm__inst_executed_pipe_{pipe}.avg.pct_of_peak_sustained_active": f"{pipe} pipe"
    for pipe in ("alu", "fma", "xu")
}
"""Use of the pipes for integers and comparisons, for products, and for reciprocals and conversions:
which of them bounds a kernel that neither DRAM nor issue slots do."""

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM throughput",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved occupancy",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors per load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors per store",
    **PIPES,
}
"""Of 128-bit accesses a warp's request is 16 sectors: fewer means narrower ones."""

PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def ncu(run: GpuRun) -> None:
    """Key counters of the three main kernels, and of reads from the host, as notes of the rows."""
    tool = shutil.which("ncu")
    for what, kernel in KERNELS.items():
        if run.rehearsal:
            profiled(what, "cpu", run.scale.host)
            run.note(f"{what} ran without ncu")
            continue
        if tool is None:
            raise Skip("ncu is not on PATH")
        found, said = _counted(tool, what, kernel, METRICS)
        if not found:
            # ncu counts nothing where this card lacks one of the counters
            found, said = _counted(
                tool, what, kernel, [name for name in METRICS if name not in PIPES]
            )
        if not found:
            raise Skip(f"ncu gave no counters: {said}")
        run.note(f"{what}: " + ", ".join(f"{name} {value}" for name, value in found.items()))


def _counted(
    tool: str, what: str, kernel: str, metrics: Iterable[str]
) -> tuple[dict[str, str], str]:
    """The counters of the last launch of `kernel`, and the last line that ncu printed."""
    options = ["--csv", "--clock-control", "none", "--metrics", ",".join(metrics)]
    options += ["--kernel-name", f"regex:{kernel}"]
    options += ["--launch-skip", str(LAUNCHES - 1), "--launch-count", "1"]
    done = _run([tool, *options, sys.executable, "-m", "bench.gpu.profiled", what], 120)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return counters(done.stdout), said[-1] if said else "and said nothing"


def counters(printed: str) -> dict[str, str]:
    """Name → value and unit, from what `ncu --csv` printed between its own lines and the
    program's."""
    lines = printed.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    return {
        METRICS[row["Metric Name"]]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row.get("Metric Name") in METRICS
    }


def sanitize(run: GpuRun) -> None:
    """memcheck and racecheck over every kernel at small sizes; what they find is an error of the
    run."""
    tool = shutil.which("compute-sanitizer")
    if run.rehearsal:
        exercise("cpu", torch.bfloat16)
        run.note("every kernel ran without compute-sanitizer")
        return
    if tool is None:
        raise Skip("compute-sanitizer is not on PATH")
    for check in ("memcheck", "racecheck"):
        fault = sanitized(tool, check)
        run.note(f"{check}: {fault or 'nothing found'}")
        if fault:
            raise RuntimeError(f"compute-sanitizer {check}: {fault}")


def sanitized(tool: str, check: str) -> str:
    """What that check of compute-sanitizer says against our kernels; empty if nothing."""
    done = _run(
        [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "bench.gpu.exercise",
        ],
        300,
    )
    return (
        ""
        if done.returncode == 0
        else (done.stdout[-3000:] + done.stderr[-1000:]).strip() or f"exit code {done.returncode}"
    )


def _run(command: Sequence[str], limit_s: int) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([PATH, os.environ.get("PYTHONPATH", "")]),
    }
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not done after {limit_s} s")

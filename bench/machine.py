"""Where figures come from: processor or GPU, versions, commit, day, and how the tests went."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "lm_eval", "ray")


@dataclass(frozen=True)
class Machine:
    """One machine on one day.

    Attributes:
        kind: for file names: "cpu-2-cores", "nvidia-h200".
        model: the processor, cores that this process may use, vector width and torch's threads; or
            the GPU and its driver.
        versions: "torch 2.13.0, …", Python's first.
        commit: see `commit`.
        tests: how those of what is timed went: "93 passed".
    """

    kind: str
    model: str
    versions: str
    commit: str
    date: str
    tests: str = ""

    @classmethod
    def here(cls, device: torch.device | None = None, tests: str = "") -> Machine:
        """This machine, or the GPU `device` of it."""
        import torch

        if device is not None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            kind = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            model = f"{name}, driver {driver.splitlines()[0]}" if driver else name
        else:
            has_affinity = hasattr(os, "sched_getaffinity")
            cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
            kind = f"cpu-{cores}-cores"
            model = (
                f"{_processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()},"
                f" {torch.get_num_threads()} threads"
            )
        now = datetime.datetime.now(datetime.timezone.utc)
        return cls(kind, model, _versions(), commit(), now.date().isoformat(), tests)


def commit() -> str:
    """Return the commit of this tree, with a + where it holds changes that are not committed.

    A copy without its history says what `PA_FAST_COMMIT` does, else "unknown".
    """
    found = _output("git", "rev-parse", "--short", "HEAD")
    if not found or _output("git", "rev-parse", "--show-toplevel") != os.path.realpath(ROOT):
        return os.environ.get("PA_FAST_COMMIT", "") or "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return found + "+" * bool(changed)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def _output(*command: str) -> str:
    """What `command` prints, or nothing where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

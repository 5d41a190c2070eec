"""Where figures come from: processor, cores, versions, commit, day."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "lm_eval", "ray")


@dataclass(frozen=True)
class Machine:
    """One machine on one day.

    Attributes:
        kind: for file names: "cpu-2-cores".
        model: the processor, cores that this process may use, vector width and torch's threads.
        versions: "torch 2.13.0, …", Python's first.
        commit: of this tree, with a + where it holds changes that are not committed; empty outside
            git.
    """

    kind: str
    model: str
    versions: str
    commit: str
    date: str

    @classmethod
    def here(cls) -> Machine:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = f"cpu-{cores}-cores"
        model = (
            f"{_processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()},"
            f" {torch.get_num_threads()} threads"
        )
        now = datetime.datetime.now(datetime.timezone.utc)
        return cls(kind, model, _versions(), _commit(), now.date().isoformat())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _commit() -> str:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return ""

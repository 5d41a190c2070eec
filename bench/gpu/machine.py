"""What a result was measured on: the columns that every row carries."""

from __future__ import annotations

import datetime
import pathlib
import re
import subprocess

import torch

ROOT = pathlib.Path(__file__).parents[2]


def machine(device: torch.device, suite: str) -> dict[str, str]:
    """Date, GPU, driver, versions and commit; `suite` says how the tests went."""
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": gpu,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": (
            _said("git", "rev-parse", "--short", "HEAD")
            + ("+" if _said("git", "status", "--porcelain", "-uno") else "")
        ),
        "tests": suite,
    }


def file_name(machine: dict[str, str]) -> str:
    """`<date>-<gpu>.csv`."""
    return f"{machine['date']}-{re.sub(r'[^a-z0-9]+', '-', machine['gpu'].lower()).strip('-')}.csv"


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (
        done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""
    )

"""Environments of the tools that benchmarks compare with, each apart from ours: `python -m bench.peers` makes them.

They lie under `$PA_FAST_BENCH_PEERS` (default `~/.cache/pa_fast/peers`), take about 1.5 GB with a CPU build of torch, and are
used where they exist; a benchmark without its peer is skipped and says so. `TORCH=` chooses the build, as for make.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
import venv

MERGEKIT = "mergekit==0.1.5"
ROOT = pathlib.Path(os.environ.get("PA_FAST_BENCH_PEERS", "~/.cache/pa_fast/peers")).expanduser()


def mergekit() -> pathlib.Path | None:
    """The program `mergekit-yaml`, or None where `python -m bench.peers` has not run."""
    program = ROOT / MERGEKIT / "bin" / "mergekit-yaml"
    return program if program.exists() else None


def versions(program: pathlib.Path) -> str:
    """What is beside `program`: the versions that bear on speed."""
    names = ("mergekit", "torch", "safetensors", "transformers")
    code = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return subprocess.run([program.with_name("python"), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def make() -> None:
    """Install every peer that is missing."""
    folder = ROOT / MERGEKIT
    if mergekit():
        print(f"{folder}: is there")
        return
    print(f"{folder}: installing {MERGEKIT} and torch ({os.environ.get('TORCH', 'torch==2.13.0')})", flush=True)
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, *shlex.split(os.environ.get("TORCH", "torch==2.13.0"))], check=True)
    subprocess.run([*pip, MERGEKIT], check=True)
    print(f"{folder}: {versions(folder / 'bin' / 'mergekit-yaml')}")


if __name__ == "__main__":
    sys.exit(make())

"""Environments of the tools that benchmarks compare with, each apart from ours: `python -m
bench.peers` makes them.

They lie under `$PA_FAST_BENCH_PEERS` (default `~/.cache/pa_fast/peers`), take 1 to 1.6 GB each with
a CPU build of torch, and are used where they exist; a benchmark without its peer leaves it out and
says so. `TORCH=` chooses the build, as for make.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shlex
import subprocess
import sys
import venv
from dataclasses import dataclass

ROOT = pathlib.Path(os.environ.get("PA_FAST_BENCH_PEERS", "~/.cache/pa_fast/peers")).expanduser()
TORCH = os.environ.get("TORCH", "torch==2.13.0")


@dataclass(frozen=True)
class Peer:
    """A tool in an environment of its own: what pip is asked for, and the packages whose versions
    bear on speed."""

    requirement: str
    program: str
    packages: tuple[str, ...]

    @property
    def path(self) -> pathlib.Path:
        """Its program."""
        return ROOT / self.requirement / "bin" / self.program

    @property
    def is_here(self) -> bool:
        """Whether `python -m bench.peers` has run to its end here."""
        return bool(self.versions())

    def versions(self) -> str:
        """The versions of `packages` in its environment; empty where one is missing."""
        return installed(self.path.with_name("python"), self.packages)

    def make(self) -> None:
        """Install it, if it is missing."""
        if not self.is_here:
            folder = self.path.parents[1]
            print(f"{folder}: installing {TORCH} and {self.requirement}", flush=True)
            venv.create(folder, with_pip=True)
            pip = [
                self.path.with_name("python"),
                "-m",
                "pip",
                "install",
                "--disable-pip-version-check",
                "-q",
            ]
            subprocess.run([*pip, *shlex.split(TORCH)], check=True)
            subprocess.run([*pip, self.requirement], check=True)
            installed.cache_clear()
        print(f"{self.path.parents[1]}: {self.versions()}")


MERGEKIT = Peer(
    "mergekit==0.1.5", "mergekit-yaml", ("mergekit", "torch", "safetensors", "transformers")
)
SD_MECHA = Peer("sd-mecha==1.1.8", "python", ("sd-mecha", "torch", "safetensors"))
ALL = (MERGEKIT, SD_MECHA)


@functools.cache
def installed(python: pathlib.Path | str, packages: tuple[str, ...]) -> str:
    """`name version, …` of `packages` in the environment of `python`; empty where it, or one of
    them, is missing."""
    code = (
        "from importlib.metadata import version; print(', '.join(f'{n} {version(n)}' for n in"
        f" {packages}))"
    )
    try:
        return subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    for peer in ALL:
        peer.make()
    sys.exit(not all(peer.is_here for peer in ALL))

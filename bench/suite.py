"""Correctness first: the tests that must pass before anything is timed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from bench.machine import ROOT


def tests_passed(*arguments: str, **environment: str) -> str:
    """Run pytest; return how many passed ("93 passed"), or nothing where one failed or none
    passed."""
    print("correctness first …", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**environment, **os.environ},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    passed = re.search(r"\d+ passed", done.stdout)
    right = done.returncode == 0 and passed is not None
    print(f"{passed[0]}\n" if right and passed else done.stdout, flush=True)
    return passed[0] if right and passed else ""

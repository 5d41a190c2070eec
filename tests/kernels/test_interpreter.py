"""Kernel bodies without a GPU: their tests in a process in which Triton interprets."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "bodies", ["test_triton.py", "test_lowrank_triton.py", "test_packed_triton.py"]
)
def test_kernel_bodies_in_the_interpreter(bodies: str, which: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            f"tests/kernels/{bodies}",
            "-m",
            which,
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 0, done.stdout
    assert "skipped" not in done.stdout, done.stdout

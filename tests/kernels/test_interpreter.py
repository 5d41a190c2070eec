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
    "bodies",
    # in two processes, for two cores: each takes seconds to start
    [("test_triton.py", "test_lowrank_triton.py"), ("test_packed_triton.py",)],
    ids=" and ".join,
)
def test_kernel_bodies_in_the_interpreter(bodies: tuple[str, ...], which: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *(f"tests/kernels/{name}" for name in bodies),
            "-m",
            which,
            "-v",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for name in bodies:
        assert re.search(rf"^tests/kernels/{name} \.", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout, done.stdout

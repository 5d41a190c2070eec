"""Tests marked `gpu` where there is no GPU: in a process in which `cuda` is the CPU and Triton
interprets. What is left to a GPU is listed in docs/development.md."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KERNELS = ("kernels/test_gpu.py", "kernels/test_lowrank_gpu.py")
LIVE = ("test_conformance.py",)


@pytest.mark.parametrize(
    ("files", "marks"),
    [
        (KERNELS, "gpu and not slow"),
        pytest.param(KERNELS, "gpu and slow", marks=pytest.mark.slow),
        # of whole models and files the interpreter takes minutes
        pytest.param(LIVE, "gpu", marks=pytest.mark.slow),
    ],
    ids=["kernels", "more of kernels", "live weights"],
)
def test_tests_for_a_gpu_pass_without_one(files: tuple[str, ...], marks: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *(f"tests/{file}" for file in files),
            *("-p", "tests.without_gpu", "-p", "no:cacheprovider", "-m", marks, "-rs"),
            *(["-k", "plain and not wide"] if files == LIVE else []),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20, done.stdout
    skipped = set(re.findall(r"^SKIPPED .*?: (.*)$", done.stdout, re.MULTILINE))
    assert all(reason.startswith("needs a CUDA device: ") for reason in skipped), skipped


def test_what_is_left_to_a_gpu_is_on_the_page() -> None:
    page = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    left = {
        reason
        for path in (ROOT / "tests").rglob("test_*.py")
        for reason in re.findall(r'mark\.gpu\(only="(.*?)"\)', path.read_text(encoding="utf-8"))
    }
    assert left and all(f"- {reason}: " in page for reason in left), left

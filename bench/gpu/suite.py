"""The tests that come before any speed: what is marked `gpu` or `triton`, or the kernels' own under
the interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from bench.gpu.machine import ROOT


def suite(interpreted: bool = False) -> str | None:
    """Run them, and say how many passed; None if one failed or nothing passed.

    Where pytest-xdist is there, four processes share the work: most of it is compilation.
    """
    several = ["-n", "4"] if importlib.util.find_spec("xdist") and not interpreted else []
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests",
            "-m",
            "(gpu or triton) and not slow",
            "-k",
            "not sanitizer",
            "-rs",
            *several,
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"} if interpreted else None,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout, flush=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    return f"{passed[1]} passed" if done.returncode == 0 and passed is not None else None

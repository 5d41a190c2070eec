"""Correctness first: the tests that must pass before anything is timed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.machine import ROOT


def tests_passed(*arguments: str, limit_s: float | None = None, **environment: str) -> str:
    """Run pytest; return how many passed ("93 passed"), or nothing where one failed, none passed,
    or they were not done after `limit_s`."""
    print("correctness first …", flush=True)
    code, printed = run_limited(
        [sys.executable, "-m", "pytest", *arguments], limit_s, {**environment, **os.environ}
    )
    passed = re.search(r"\d+ passed", printed)
    right = code == 0 and passed is not None
    late = f"\nnot done after {limit_s:.0f} s" if code is None and limit_s else ""
    print(f"{passed[0]}\n" if right and passed else f"{printed}{late}", flush=True)
    return passed[0] if right and passed else ""


def run_limited(
    command: Sequence[str],
    limit_s: float | None,
    environment: Mapping[str, str],
    quiet: bool = True,
) -> tuple[int | None, str]:
    """Run `command` in the repository's root, and end it and all that it started after `limit_s`.

    Returns: its exit code, None where it was ended; and, if `quiet`, what it printed on stdout.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        start_new_session=True,  # a group of its own, so that its children end with it
    ) as started:
        try:
            printed, _ = started.communicate(timeout=limit_s)
            return started.returncode, printed or ""
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            printed, _ = started.communicate()
            return None, printed or ""
        except BaseException:
            os.killpg(started.pid, signal.SIGKILL)
            raise

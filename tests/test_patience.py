"""Watchdogs of the suite: what gets on is waited for, what has stalled is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests import patience

# two processes, each waiting for the other's byte; the child says where
DEADLOCK = """
import faulthandler, os
faulthandler.enable()
a, b = os.pipe(), os.pipe()
def waits_for_the_other(): os.read((a if os.fork() == 0 else b)[0], 1)
waits_for_the_other()
"""
# no output, no files: only work, in a child, for four times as long as a stall would be borne
SLOW = """
import subprocess, sys
work = "from time import time as t\\nend = t() + 4\\nwhile t() < end: sum(range(1000))"
subprocess.run([sys.executable, "-c", work], check=True); print("done")
"""


def test_what_works_for_long_is_waited_for() -> None:
    done = patience.run([sys.executable, "-c", SLOW], idle_s=1)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="progress is read from /proc")
def test_processes_that_wait_for_each_other_are_ended_and_say_where() -> None:
    begun = time.monotonic()
    with pytest.raises(patience.Stalled, match="no progress in 1 s") as caught:
        patience.run([sys.executable, "-c", DEADLOCK], idle_s=1)
    assert "waits_for_the_other" in str(caught.value)
    assert time.monotonic() - begun < 60


def test_a_spin_is_ended_by_the_limit() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        watch = patience.Watch(process.pid, idle_s=60, limit_s=0.5)
        assert watch.stalled() is None
        time.sleep(0.6)
        assert watch.stalled() == "still running after 0 s"
        process.kill()

"""Whole processes from start to end: wall and processor seconds, bytes moved, anonymous memory."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from pa_fast.throughput.harness import Sample

EVERY_S = 0.01
REST_S = 3.0


def silently(*command: str) -> None:
    """Run a command that must succeed, and drop what it prints."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def process(*command: object) -> Sample:
    """Run a command from start to end, its own children included but for their memory: bytes asked
    for by read and write calls and pages of files that came into its maps; anonymous memory, looked
    at every 10 ms.

    Raises:
        AssertionError: it failed; what it said on stderr is the message.
    """
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=said
        )
        watched = pathlib.Path(f"/proc/{child.pid}")
        peak = mapped = mapped_before = 0
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            # the system's own high-water mark begins with that of the process that forked
            held = _kilobytes(watched / "status")
            peak = max(peak, held.get("RssAnon", 0))
            mapped, mapped_before = (
                mapped + max(held.get("RssFile", 0) - mapped_before, 0),
                held.get("RssFile", 0),
            )
            time.sleep(EVERY_S)
        wall_s = time.perf_counter() - began
        # it waits to be reaped
        calls = dict(line.split(": ") for line in (watched / "io").read_text().splitlines())
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        assert child.returncode == 0, said.read().decode()
    moved = int(calls["rchar"]) + int(calls["wchar"]) + mapped
    return Sample(wall_s, usage.ru_utime + usage.ru_stime, moved, peak)


def removed(folder: pathlib.Path) -> None:
    """Remove what a way wrote, and wait until the system has done with its memory.

    Machines that lend memory by the page take free pages back after a moment, and new ones cost
    seconds per GB: a way that began at once would find the pages of the one before, and the next
    would not.
    """
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(REST_S)


def _kilobytes(status: pathlib.Path) -> dict[str, int]:
    """The rows of /proc/PID/status that are in kB, in bytes; none once the process has ended."""
    rows = [line.split() for line in status.read_text().splitlines() if line.endswith(" kB")]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}

"""Waiting for other processes by their progress: a busy machine makes them slow, and only a stall
makes them idle."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.programs import Program

IDLE_S = 60.0
"""A tree of processes that computes for less than IDLE of this time has stalled."""

IDLE = 0.02
"""Of one core. Launchers that only look at their children take less, the least share of a crowded
machine is more."""

LIMIT_S = 1800.0
"""Ends what spins for ever."""

_TICK_S = 0.5


class Stalled(AssertionError):
    """Processes that do nothing any more, or for too long."""


class Watch:
    """Progress of a process and of all that descends from it, by the CPU time that they take."""

    def __init__(self, pid: int, idle_s: float = IDLE_S, limit_s: float = LIMIT_S):
        self.pid, self.idle_s, self.limit_s = pid, idle_s, limit_s
        self._begun = time.monotonic()
        self._seen: deque[tuple[float, float]] = deque([(self._begun, 0.0)])

    def stalled(self) -> str | None:
        """Say why there is no use in waiting on; None while there is."""
        now = time.monotonic()
        if now - self._begun > self.limit_s:
            return f"still running after {self.limit_s:.0f} s"
        self._seen.append((now, cpu_seconds(self.pid)))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self.idle_s:
            self._seen.popleft()
        (before, first), (_, last) = self._seen[0], self._seen[-1]
        # what ended meanwhile leaves the sum, so that a change down is one, too
        idle = now - before >= self.idle_s and abs(last - first) < IDLE * self.idle_s
        return f"no progress in {self.idle_s:.0f} s" if idle else None


def communicate(
    process: subprocess.Popen[Any] | Program, idle_s: float = IDLE_S
) -> tuple[Any, Any]:
    """`process.communicate()` for as long as the process, or a child of it, gets on.

    Raises:
        Stalled: it did not; it was aborted, with its last words: the stacks of processes that
            turned `faulthandler` on.
    """
    watch = Watch(process.pid, idle_s)
    while True:
        try:
            return process.communicate(timeout=_TICK_S)
        except subprocess.TimeoutExpired:
            why = watch.stalled()
        if why is not None:
            family = [process.pid, *descendants(process.pid)]
            for pid in reversed(family):
                _signal(pid, signal.SIGABRT)
            time.sleep(1)
            for pid in family:
                _signal(pid, signal.SIGKILL)
            out, errors = process.communicate()
            raise Stalled(
                f"{process.args}: {why}\n{str(out or '')[-4000:]}\n{str(errors or '')[-8000:]}"
            )


def run(
    command: Sequence[str], idle_s: float = IDLE_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with output captured as text, for as long as the command gets on; see
    `communicate`."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        out, errors = communicate(process, idle_s)
    return subprocess.CompletedProcess(list(command), process.returncode, out, errors)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, its ended children, and all that descends from it; where /proc is
    missing, the time of day."""
    if not pathlib.Path("/proc/self/stat").exists():
        return time.monotonic()
    ticks = 0
    for member in [pid, *descendants(pid)]:
        if (fields := _stat(member)) is not None:
            ticks += sum(int(value) for value in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """Ids of children, their children, and so on; the oldest first."""
    parents: dict[int, list[int]] = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(entry.name))) is not None:
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    return _below(pid, parents)


def _below(pid: int, children: Mapping[int, list[int]]) -> list[int]:
    direct = children.get(pid, [])
    return [*direct, *(found for child in direct for found in _below(child, children))]


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None where the process is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

"""A process that merges when told to, in children that end by SIGKILL at a chosen call of the
operating system.

    python -m tests.checkpoint.killed BASE INSTRUCT OUT OPTIONS      OPTIONS of `merge`, as JSON

then a number on each line of stdin, answered by a line:

    N    killed at the Nth such call: "killed", or "done" if there were fewer
    0    not killed: how many calls there were

Forking is far cheaper than starting: torch is imported once, and runs nothing before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pa_kernels  # noqa: F401

from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.pair import pair
from pa_fast.checkpoint.reader import Checkpoint

CALLS = (
    "open",
    "pwrite",
    "fsync",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "posix_fallocate",
    "close",
)


class Counted:
    """The calls so far; the one of number `last` is the end. Half of what it should write is
    written."""

    def __init__(self, last: int):
        self.last = last
        self.count = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.last:
                if function is pwrite:
                    fd, data, at = args
                    function(fd, data[: len(data) // 2], at)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted


pwrite = os.pwrite


def child(last: int, arguments: list[str]) -> None:
    counted = Counted(last)
    for name in CALLS:
        setattr(os, name, counted.wrap(getattr(os, name)))
    report = merge(*arguments[:2], 0.3, arguments[2], **json.loads(arguments[3]))
    print(f"{counted.count} {report.resumed}", flush=True)


def main() -> None:
    with Checkpoint.open(sys.argv[1]) as base, Checkpoint.open(sys.argv[2]) as instruct:
        # imports transformers where configurations differ, once for all children
        pair(base, instruct)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            code = 1
            try:
                child(int(line), sys.argv[1:])
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            print("killed", flush=True)
        elif status:
            print("failed", flush=True)


if __name__ == "__main__":
    main()

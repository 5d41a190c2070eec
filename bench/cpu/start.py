"""Start (P13): processes from their beginning to their end."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys

from bench.cases import JOBS
from bench.process import silently
from bench.run import Run
from pa_fast.throughput.harness import Way

CASE = JOBS["start"]
HEAVY = (
    "import sys, pa_fast; sys.exit(any(name in sys.modules for name in ('torch', 'transformers',"
    " 'matplotlib')))"
)


def start(run: Run) -> None:
    assert subprocess.run([sys.executable, "-c", HEAVY]).returncode == 0, (
        "`import pa_fast` imports what is heavy"
    )
    program = str(pathlib.Path(sys.executable).with_name("pa-fast"))

    def process(name: str, *command: str) -> Way:
        return Way(name, functools.partial(silently, *command))

    ours = process("pa-fast --help", program, "--help")
    ways = CASE.time(
        ours,
        ours.repeated,
        process("python -c 'import pa_fast'", sys.executable, "-c", "import pa_fast"),
        process("python -c pass", sys.executable, "-c", "pass"),
    )
    helped, _, imported, nothing = (way.median_s for way in ways.values())
    run.record(
        CASE.target,
        "start, whole processes",
        ways.values(),
        "python -c pass",
        goal=CASE.goal,
        headline=(
            f"`--help` {helped:.2f} s; `import pa_fast` {imported - nothing:.2f} s, no torch"
        ),
    )

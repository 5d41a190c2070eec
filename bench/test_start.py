"""Start (P13): processes from their beginning to their end."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
from typing import Any

from bench.cases import JOBS
from bench.table import record, timed

CASE = JOBS["start"]
HEAVY = (
    "import sys, pa_fast; sys.exit(any(name in sys.modules for name in ('torch', 'transformers',"
    " 'matplotlib')))"
)


def test_start(benchmark: Any) -> None:
    assert subprocess.run([sys.executable, "-c", HEAVY]).returncode == 0, (
        "`import pa_fast` imports what is heavy"
    )
    program = str(pathlib.Path(sys.executable).with_name("pa-fast"))
    commands = {
        "pa-fast --help": [program, "--help"],
        "pa-fast --help, again": [program, "--help"],
        "python -c 'import pa_fast'": [sys.executable, "-c", "import pa_fast"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    ways = timed(
        {name: functools.partial(run, *command) for name, command in commands.items()},
        CASE.rounds_here,
    )
    helped, again, imported, nothing = ways
    record(
        benchmark,
        CASE.target,
        "start, whole processes",
        ways,
        against=nothing.name,
        goal=CASE.goal,
        noise=(helped.name, again.name),
        headline=(
            f"`--help` {helped.median_s:.2f} s; `import pa_fast`"
            f" {imported.median_s - nothing.median_s:.2f} s, no torch"
        ),
    )


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

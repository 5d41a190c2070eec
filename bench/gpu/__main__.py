"""The command line of `python -m bench.gpu`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bench.gpu.plan import STAGES, TESTS, plan
from bench.gpu.stage import run_stage
from bench.suite import run_limited, tests_passed

if TYPE_CHECKING:
    from bench.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Speeds on the first GPU, each after the tests of what it times. Without a GPU:"
        " those tests under Triton's interpreter, and a rehearsal. Ends with 1 if anything failed.",
        epilog=f"stages, in order: {', '.join(STAGES)}; groups of tests: {', '.join(TESTS)}",
    )
    parser.add_argument(
        "--only",
        metavar="STAGES",
        help="stages to time, with commas between; `tests` alone runs all tests",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin nothing that would not be done so many minutes from now",
    )
    parser.add_argument(
        "--only-time",
        action="store_true",
        help="skip the tests: rows say so; what is timed is still proven",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="walk through every stage at tiny sizes under the interpreter; with --out, rows"
        " without figures are written",
    )
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="run the stages in this process: quicker, and a fault of one ends all",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FOLDER", help="where results go (bench/results)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the commands for a GPU that is lent, and end"
    )
    options = parser.parse_args()
    if options.plan:
        print(*plan(), sep="\n")
        return 0
    names = (
        [*STAGES] if options.only is None else [name for name in options.only.split(",") if name]
    )
    unknown = [name for name in names if name not in (*STAGES, "tests")]
    if unknown or not names:
        parser.error(
            f"no stage is called {', '.join(unknown) or 'nothing'}; there are:"
            f" {', '.join(STAGES)}, tests"
        )
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    import torch

    rehearsal = options.rehearse or not torch.cuda.is_available()
    if rehearsal:
        # Triton and pa_kernels read it when they are imported
        os.environ["TRITON_INTERPRET"] = "1"
        print(
            "Rehearsal: kernel bodies run under Triton's interpreter on the CPU. Nothing runs on a"
            " GPU, no time means anything."
        )
    suite = Suite(rehearsal, until, is_skipped=options.only_time or options.rehearse)
    if names == ["tests"]:
        return 1 if suite.failed(TESTS) else 0
    chosen = [name for name in STAGES if name in names or name == "ceilings"]
    with tempfile.TemporaryDirectory() as scratch:
        return time_all(chosen, suite, pathlib.Path(scratch) / "run.json", options)


@dataclass
class Suite:
    """The groups of tests, each run when it is first asked for."""

    rehearsal: bool
    until: float
    is_skipped: bool = False
    outcomes: dict[str, str] = field(default_factory=dict)

    def failed(self, groups: Sequence[str] | dict[str, object]) -> list[str]:
        """Run those of `groups` that have not run. Returns those that failed, or were not done."""
        if self.is_skipped:
            return []
        for name in groups:
            if name not in self.outcomes:
                print(f"tests of {name}: ", end="")
                self.outcomes[name] = self._run(name)
        return [name for name in groups if not self.outcomes[name]]

    def needs_s(self, groups: Sequence[str]) -> int:
        """Seconds of those that have not run."""
        new = () if self.is_skipped else [name for name in groups if name not in self.outcomes]
        return sum(TESTS[name].needs_s for name in new)

    def __str__(self) -> str:
        if self.is_skipped:
            return "tests skipped"
        return ", ".join(f"{name} {said or 'FAILED'}" for name, said in self.outcomes.items())

    def _run(self, name: str) -> str:
        """In four processes where pytest-xdist is there: most of it is compilation."""
        group = TESTS[name]
        several = ["-n", "4"] if importlib.util.find_spec("xdist") and not self.rehearsal else []
        marks = ["-m", "(gpu or triton) and not slow", "-k", f"({group.only}) and not sanitizer"]
        limit_s = None if self.rehearsal else min(group.limit_s, self.until - time.monotonic())
        paths = [f"tests/{path}" for path in group.paths]
        return tests_passed(*paths, *marks, "-rs", *several, limit_s=limit_s)


def time_all(
    names: Sequence[str], suite: Suite, state: pathlib.Path, options: argparse.Namespace
) -> int:
    """Run the stages for which there is time and whose tests pass, one after the other, whatever
    becomes of each. Returns the exit code."""
    import torch

    from bench.machine import Machine
    from bench.report import LAST, RESULTS, Report

    rehearsal = suite.rehearsal
    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    machine = Machine.here(device, str(suite))
    report = Report(
        replace(machine, kind="rehearsal") if rehearsal else machine,
        "tiny" if rehearsal else "8b",
        folder=options.out or (None if rehearsal else RESULTS),
        json=state,
        rehearsal=rehearsal,
    )
    report.write()
    for name in names:
        stage = STAGES[name]
        left_s = suite.until - time.monotonic()
        if stage.needs_s + suite.needs_s(stage.tests) > left_s:
            report.note(f"{name}: left out with its tests: {max(left_s, 0):.0f} s are left")
            continue
        wrong = suite.failed(stage.tests)
        report.machine = replace(report.machine, tests=str(suite))
        if wrong:
            report.failed.append(name)
            report.note(f"{name}: not timed: the tests of {', '.join(wrong)} did not pass")
            continue
        report.write()
        where = {"folder": report.folder, "stem": report.stem, "rehearsal": rehearsal}
        if options.one_process:
            run_stage(name, state, left_s=suite.until - time.monotonic(), **where)
            code: int | None = 0
        else:
            code = _in_a_process(name, suite.until - time.monotonic(), **where, state=state)
        found = Report.read([state])
        report.tables, report.notes = found.tables, found.notes
        report.failed, report.skipped = found.failed, found.skipped
        if code != 0 and name not in report.failed:
            report.failed.append(name)
            how = "was stopped, not done in time" if code is None else f"ended with code {code}"
            report.note(f"{name}: failed: its process {how}")
    if rehearsal:
        print(_rehearsed(report, len(names)))
    else:
        report.json = LAST.with_name("gpu.json")
        print(f"\n{report.summary()}\n", *report.write(), sep="\n")
        print(f"failed: {', '.join(report.failed)}" * bool(report.failed))
    return 1 if report.failed else 0


def _in_a_process(
    name: str,
    left_s: float,
    *,
    state: pathlib.Path,
    folder: pathlib.Path | None,
    stem: str | None,
    rehearsal: bool,
) -> int | None:
    """The exit code of the stage's process; None where it was stopped after its limit."""
    command = [sys.executable, "-m", "bench.gpu.stage", name, "--state", str(state)]
    command += ["--left-s", str(left_s)]
    command += ["--folder", str(folder.absolute()), "--stem", str(stem)] if folder else []
    command += ["--rehearsal"] if rehearsal else []
    limit_s = None if rehearsal else min(STAGES[name].limit_s, max(left_s, 1) + 30)
    sys.stdout.flush()
    return run_limited(command, limit_s, os.environ, quiet=False)[0]


def _rehearsed(report: Report, stages: int) -> str:
    if report.failed:
        return f"rehearsal: FAILED in {', '.join(report.failed)}"
    rows = sum(len(table.ways) for table in report.tables)
    written = f"rows without figures in {report.folder}" if report.folder else "nothing written"
    return (
        f"rehearsal: {rows} rows of {stages} stages, bits right, nothing timed on a GPU, {written}"
    )


if __name__ == "__main__":
    sys.exit(main())

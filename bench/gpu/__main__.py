"""The command line of `python -m bench.gpu`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from bench.suite import tests_passed

STAGES = {
    "ceilings": ("ceilings:ceilings", 30),
    "lerp": ("lerp:lerp", 40),
    "packed": ("packed:packed", 60),
    "host": ("host:host", 30),
    "checksum": ("checksum:checksum", 20),
    "graph": ("graph:graph", 15),
    "sweep": ("sweep:sweep", 110),
    "encode": ("encode:encode", 40),
    "first": ("first_switch:first_switch", 60),
    "sparse": ("sparse:sparse", 40),
    "lowrank": ("lowrank:lowrank", 40),
    "stochastic": ("stochastic:stochastic", 30),
    "ncu": ("tools:ncu", 90),
    "sanitize": ("tools:sanitize", 120),
}
"""What is timed, in order of importance: where it is, and about how many seconds it takes on an
H200. Imported late, because an environment variable has to come before."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Tests first, then speeds, on the first GPU. Without one: tests and rehearsal.",
        epilog=f"stages, in order: {', '.join(STAGES)}",
    )
    parser.add_argument(
        "--only",
        metavar="STAGES",
        help="stages to time, with commas between; `tests` alone runs the tests",
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
        help="walk through every stage at tiny sizes under the interpreter",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FOLDER", help="where results go (bench/results)"
    )
    options = parser.parse_args()
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
    tests = "tests skipped"
    if not options.only_time and not options.rehearse:
        tests = _tests(rehearsal)
        if not tests:
            print("a test failed: no speed is printed", file=sys.stderr)
            return 1
    if names == ["tests"]:
        return 0
    return time_all(names, until, options.out, rehearsal, tests)


def _tests(rehearsal: bool) -> str:
    """Run what is marked `gpu` or `triton`, in four processes where pytest-xdist is there: most of
    it is compilation."""
    several = ["-n", "4"] if importlib.util.find_spec("xdist") and not rehearsal else []
    marks = ["-m", "(gpu or triton) and not slow", "-k", "not sanitizer", "-rs"]
    return tests_passed("tests", *marks, *several)


def time_all(
    names: Sequence[str], until: float, out: pathlib.Path | None, rehearsal: bool, tests: str
) -> int:
    """Run the stages for which there is time, ceilings before all others. Returns the exit code."""
    import torch

    from bench.gpu.run import GpuRun
    from bench.gpu.scale import FULL, TINY
    from bench.machine import Machine
    from bench.report import LAST, RESULTS, Report
    from bench.run import Stage, perform

    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    kept = {} if rehearsal else {"folder": out or RESULTS, "json": LAST.with_name("gpu.json")}
    size = "tiny" if rehearsal else "8b"
    report = Report(Machine.here(device, tests), size, rehearsal=rehearsal, **kept)
    stages = [
        Stage.at(name, f"bench.gpu.{place}", needs_s)
        for name, (place, needs_s) in STAGES.items()
        if name in names or name == "ceilings"
    ]
    run = GpuRun(report, until, device=device, scale=TINY if rehearsal else FULL)
    failed = perform(run, stages)
    if rehearsal:
        rows = sum(len(table.ways) for table in report.tables)
        print(
            f"rehearsal: FAILED in {', '.join(failed)}"
            if failed
            else f"rehearsal: {rows} rows of {len(names)} stages, bits right, nothing timed on a"
            " GPU, nothing written"
        )
    else:
        print(f"\n{report.summary()}\n", *report.write(), sep="\n")
        print(f"failed: {', '.join(failed)}" * bool(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

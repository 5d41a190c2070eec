"""`make bench`, or `python -m bench`: correctness first, then every benchmark that this machine can
run, then the report.

Where a test of the ops fails nothing is timed and no speed is printed. `-k load` runs the
benchmarks whose names hold `load`. Results go to bench/results; docs/benchmarks.md and its figure
are brought up to date by a whole run of `PA_FAST_BENCH_SIZE=1b`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from bench import report
from bench.cases import requested_size
from bench.suite import tests_passed

NAMES = (
    "lerp",
    "per_lambda",
    "proof",
    "sweep",
    "driver",
    "merge",
    "inspect",
    "load",
    "lm_eval",
    "shared_prefix",
    "encode",
    "start",
    "checksum",
    "packed",
    "sparse",
    "lowrank",
    "workers",
    "vllm",
)
"""Modules of bench.cpu, each with a stage of the same name."""

CHECKS = (
    *(
        f"tests/kernels/test_{op}.py"
        for op in ("dense", "checksum", "sparse", "sparse_tensor", "lowrank", "packed")
    ),
    "tests/live/test_weights.py",
    "tests/checkpoint/test_merge.py",
    "tests/checkpoint/test_verify.py",
    "tests/stores/test_packed_store.py",
    "tests/stores/test_sparse_store.py",
    "tests/stores/test_lowrank_store.py",
    "tests/engines/test_prefix.py",
)
"""Tests of what is timed; about a minute and a half on two cores."""

QUOTED = "1b"
"""The size whose figures README and docs/benchmarks.md quote."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "-k",
        metavar="NAMES",
        help=f"parts of names, with `or` between: of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--check",
        action="append",
        metavar="TESTS",
        help="tests that must pass first, in place of the usual",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=report.RESULTS, help="folder of the results"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, default=report.LAST, help="the run, for bench.report"
    )
    options = parser.parse_args(arguments)
    try:
        size = requested_size()
    except ValueError as wrong:
        parser.error(str(wrong))
    parts = (options.k or "").split(" or ")
    names = [name for name in NAMES if any(part.strip() in name for part in parts)]
    if not names:
        parser.error(f"no benchmark is called {options.k}; there are: {', '.join(NAMES)}")
    checks = options.check or CHECKS
    marks = ("-m", "not slow and not gpu and not triton")
    tests = tests_passed(*checks, "-x", *marks, PA_FAST_TEST_WALK="8")
    if not tests:
        print("\na correctness test failed: nothing is timed, no speed is printed", file=sys.stderr)
        return 1
    return time_all(names, options, size, tests)


def time_all(names: Sequence[str], options: argparse.Namespace, size: str, tests: str) -> int:
    """Run the benchmarks and report. Returns the exit code."""
    from transformers.utils import logging

    from bench.machine import Machine
    from bench.run import Run, Stage, perform

    logging.disable_progress_bar()
    measured = report.Report(
        Machine.here(tests=tests), size, folder=options.out, json=options.json.absolute()
    )
    failed = perform(Run(measured), [Stage.at(name, f"bench.cpu.{name}:{name}") for name in names])
    if not measured.tables:
        print("\nno benchmark finished: there is nothing to report", file=sys.stderr)
        return 1
    print(f"\n{measured.summary()}\n")
    print(*measured.write(), sep="\n")
    if size == QUOTED and not options.k and not failed:
        report.update(measured, report.PAGE)
        print(report.PAGE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

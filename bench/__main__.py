"""`make bench`, or `python -m bench`: correctness first, then every benchmark that this machine can
run, then the report.

Where a test of the ops fails nothing is timed and no speed is printed. Further arguments go to
pytest: `python -m bench -k load`. Results go to bench/results; docs/benchmarks.md and its figure
are brought up to date by a whole run of `PA_FAST_BENCH_SIZE=1b`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench import report
from bench.cases import asked_size
from bench.machine import ROOT

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
        "--check",
        action="append",
        metavar="TESTS",
        help="tests that must pass first, in place of the usual",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=report.RESULTS, help="folder of the results"
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        default=ROOT / ".benchmarks" / "last.json",
        help="pytest-benchmark's file",
    )
    options, asked = parser.parse_known_args(arguments)
    try:
        size = asked_size()
    except ValueError as wrong:
        parser.error(str(wrong))
    if not tests_pass(options.check or CHECKS):
        print("\na correctness test failed: nothing is timed, no speed is printed", file=sys.stderr)
        return 1
    kept = options.json.absolute()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    told = (
        "-rs",
        "--durations=8",
        "--benchmark-enable",
        "--benchmark-only",
        f"--benchmark-json={kept}",
    )
    # a pair of checkpoints is deleted once its benchmark has passed
    status = pytest("bench", "-o", "tmp_path_retention_policy=failed", *told, *asked).returncode
    if not kept.exists():
        print("\nno benchmark finished: there is nothing to report", file=sys.stderr)
        return status or 1
    found = report.Report.read([kept])
    print(f"\n{found.summary()}\n")
    print(*found.write(options.out), sep="\n")
    if size == QUOTED and not asked and not status:
        report.update(found, report.PAGE)
        print(report.PAGE)
    return status


def tests_pass(tests: Sequence[str]) -> bool:
    """Run `tests`; nothing passed is not a pass."""
    print("correctness first …", flush=True)
    shorter = {"PA_FAST_TEST_WALK": "8", **os.environ}
    done = pytest(
        *tests,
        "-x",
        "-m",
        "not slow and not gpu and not triton",
        stdout=subprocess.PIPE,
        env=shorter,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    print(
        done.stdout if done.returncode else f"{passed[0] if passed else 'nothing passed'}\n",
        flush=True,
    )
    return done.returncode == 0 and passed is not None


def pytest(
    *arguments: str, stdout: int | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=env,
        stdout=stdout,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())

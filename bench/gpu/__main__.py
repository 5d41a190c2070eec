"""The command line of `python -m bench.gpu`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

NAMES = tuple(
    [
        "ceilings",
        "lerp",
        "packed",
        "host",
        "checksum",
        "graph",
        "sweep",
        "encode",
        "first",
        "sparse",
        "lowrank",
        "stochastic",
        "ncu",
        "sanitize",
    ]
)
"""Spelled out here, because stages import what an environment variable has to come before."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Tests first, then speeds, on the first GPU. Without one: tests and rehearsal.",
        epilog=f"stages, in order: {', '.join(NAMES)}",
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
    names = NAMES if options.only is None else [name for name in options.only.split(",") if name]
    unknown = [name for name in names if name not in (*NAMES, "tests")]
    if unknown or not names:
        parser.error(
            f"no stage is called {', '.join(unknown) or 'nothing'}; there are: {', '.join(NAMES)},"
            " tests"
        )
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    import torch

    if options.rehearse or not torch.cuda.is_available():
        return without_gpu(names, tests=not options.rehearse and not options.only_time)
    return with_gpu(names, until, options.out, tests=not options.only_time)


def with_gpu(names: Sequence[str], until: float, out: pathlib.Path | None, tests: bool) -> int:
    """Tests, then every stage for which there is time. Returns the exit code."""
    import torch

    from bench.gpu.ledger import Ledger
    from bench.gpu.machine import ROOT, file_name, machine
    from bench.gpu.run import Run
    from bench.gpu.stages import perform
    from bench.gpu.suite import suite

    said = suite() if tests else "skipped"
    if said is None:
        print("a test failed: no speed is printed", file=sys.stderr)
        return 1
    if list(names) == ["tests"]:
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    about = machine(device, said)
    path = (out or ROOT / "bench" / "results") / file_name(about)
    failed = perform(Run(device, Ledger(path, about), until=until), names)
    print(f"\n{path}, and a table beside it" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def without_gpu(names: Sequence[str], tests: bool) -> int:
    """The same tests and stages under Triton's interpreter. Returns the exit code."""
    # Triton and pa_kernels read it when they are imported
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from bench.gpu.ledger import Ledger
    from bench.gpu.machine import machine
    from bench.gpu.run import Run
    from bench.gpu.scale import TINY
    from bench.gpu.stages import perform
    from bench.gpu.suite import suite

    print(
        "Rehearsal: kernel bodies run under Triton's interpreter on the CPU. Nothing runs on a GPU,"
        " no time means anything."
    )
    if tests and suite(interpreted=True) is None:
        return 1
    if list(names) == ["tests"]:
        return 0
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(
            pathlib.Path(folder) / "rehearsal.csv", machine(device, "rehearsal"), timed=False
        )
        failed = perform(Run(device, ledger, TINY), names)
    if failed:
        print(f"rehearsal: FAILED in {', '.join(failed)}")
        return 1
    print(
        f"rehearsal: {len(ledger.rows)} rows of {len(names)} stages, bits right, nothing timed on a"
        " GPU, nothing written"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

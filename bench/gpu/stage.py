"""One stage in a process of its own: `python -m bench.gpu.stage NAME …`, started by `bench.gpu`.

A kernel that faults leaves its process without a device, one that hangs never ends, and memory is
given back only by a process that ends; so none of them costs more than its own stage.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

from bench.gpu.plan import STAGES


def run_stage(
    name: str,
    state: pathlib.Path,
    *,
    folder: pathlib.Path | None = None,
    stem: str | None = None,
    left_s: float = float("inf"),
    rehearsal: bool = False,
) -> bool:
    """Run the stage `name`, and add what it records to the run at `state`.

    Args:
        folder, stem: of the CSV and Markdown files.
        left_s: seconds until the run ends.

    Returns: whether it succeeded; the run says why not.
    """
    import torch

    if rehearsal:
        from tests.interpreting import make_quicker

        make_quicker()
    from bench.gpu.run import GpuRun
    from bench.gpu.scale import FULL, TINY
    from bench.report import Report
    from bench.run import Stage, perform

    report = Report.read([state])
    report.folder, report.stem, report.json, report.rehearsal = folder, stem, state, rehearsal
    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    run = GpuRun(
        report, time.monotonic() + left_s, device=device, scale=TINY if rehearsal else FULL
    )
    run.ceilings = {k: v for table in report.tables for k, v in table.ceilings.items()}
    before = len(report.failed)
    perform(run, [Stage.at(name, f"bench.gpu.{STAGES[name].place}", STAGES[name].needs_s)])
    report.write()
    return len(report.failed) == before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.stage", description=__doc__)
    parser.add_argument("name", choices=[*STAGES])
    parser.add_argument("--state", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--stem")
    parser.add_argument("--left-s", type=float, default=float("inf"))
    parser.add_argument("--rehearsal", action="store_true")
    options = vars(parser.parse_args())
    return 0 if run_stage(options.pop("name"), options.pop("state"), **options) else 1


if __name__ == "__main__":
    sys.exit(main())

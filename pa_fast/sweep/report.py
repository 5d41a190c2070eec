"""Results and figures of runs that are there, from their journals alone."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from pa_fast.errors import UsageError
from pa_fast.sweep import figure as drawing
from pa_fast.sweep import results
from pa_fast.sweep.results import SweepResult


def report(run_dirs: Sequence[str | os.PathLike[str]], *, figure: bool = True) -> list[SweepResult]:
    """Write the results files and the figure of each run again, from its run.json and journal.

    All runs are read before anything is written. A run that is still going may be reported on. `results.table` puts
    several runs side by side.

    Raises:
        UsageError: no run named.
        RunError: a folder is not a run, or its journal is damaged.
        OutputError: a file cannot be written.
    """
    if not run_dirs:
        raise UsageError("no run folder named", "name the --out of a sweep")
    runs = [results.load(pathlib.Path(folder)) for folder in run_dirs]
    for run in runs:
        results.write(run)
        if figure:
            drawing.write(run)
    return runs

"""Results and figures of existing runs, from their journals alone."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from pa_fast import files
from pa_fast.errors import OutputError, UsageError
from pa_fast.files import path_of
from pa_fast.sweep import figure as drawing
from pa_fast.sweep import journal, results
from pa_fast.sweep.results import SweepResult


def report(
    run_dirs: Sequence[str | os.PathLike[str]],
    *,
    figure: bool = True,
    noted: Callable[[str], object] | None = None,
    objective: str | None = None,
    keep: Mapping[str, float] | None = None,
) -> list[SweepResult]:
    """Write the results files and the figure of each run again, from its run.json and journal.

    All runs are read before anything is written. A run may still be going on: each is read again
    while its lock is held, so that no row of a process that ends meanwhile is lost. `results.table`
    shows several runs side by side.

    Args:
        figure: draw `trajectory.svg` and `trajectory.png` too.
        noted: called with one line of text for a run whose folder cannot be written, and for a
            figure that cannot be drawn.
        objective, keep: the question that results.json answers, in place of that of the sweep; see
            `SweepResult.with_question`.

    Raises:
        UsageError: no run named; or `objective` or `keep` cannot be asked of one of them.
        RunError: a folder is not a run, or its journal is damaged.
        OutputError: a file of a folder that may be written cannot be written.
    """
    if not run_dirs:
        raise UsageError("no run folder named", "name the --out of a sweep")

    def load(folder: pathlib.Path) -> SweepResult:
        return results.load(folder).with_question(objective, keep)

    runs = [load(path_of(folder, "run folder")) for folder in run_dirs]
    return [
        _written(run, load, figure, noted if noted is not None else lambda note: None)
        for run in runs
    ]


def _written(
    run: SweepResult,
    load: Callable[[pathlib.Path], SweepResult],
    figure: bool,
    noted: Callable[[str], object],
) -> SweepResult:
    """Write the files of `run` while its lock is held, and return it as it is then; return it
    unchanged where its folder cannot be written."""
    try:
        with files.locked(run.out / journal.LOCK):
            run = load(run.out)
            results.write(run)
            if figure and (why_not := drawing.write(run)):
                noted(f"{run.out}: {why_not}")
    except OutputError as error:
        if not files.is_forbidden(error):
            raise
        noted(f"nothing was written for {run.out}: {error.message}")
    return run

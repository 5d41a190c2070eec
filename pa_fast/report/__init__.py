"""The report of runs: a page for people, tables for programs and papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pa_fast import files
from pa_fast.errors import OutputError
from pa_fast.report.contents import RunReport
from pa_fast.sweep import journal
from pa_fast.sweep.results import SweepResult


def write(
    results: Sequence[SweepResult], noted: Callable[[str], object] = lambda note: None
) -> list[RunReport]:
    """Write `report.html`, `statistics.csv` and `statistics.json` into the folder of each run; of
    several runs the first one's page shows all of them.

    Args:
        noted: called with one line of text for a folder that cannot be written, and for charts that
            cannot be drawn.

    Raises:
        RunError: a folder is damaged.
        OutputError: a file of a folder that may be written cannot be written.
    """
    from pa_fast.report.page import page
    from pa_fast.report.statistics import statistics_csv, statistics_json

    runs = [RunReport.of(result) for result in results if result.rows]
    for index, run in enumerate(runs):
        html, note = page(runs if index == 0 else [run])
        if note is not None and index == 0:
            noted(note)
        contents = (html.encode(), statistics_csv(run), statistics_json(run))
        try:
            with files.locked(run.result.out / journal.LOCK):
                for name, content in zip(journal.REPORT_FILES, contents):
                    files.write(run.result.out / name, content)
        except OutputError as error:
            if not files.is_forbidden(error):
                raise
            noted(f"no report was written for {run.result.out}: {error.message}")
    return runs

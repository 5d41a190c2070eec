"""Recordings: run folders to which points are added, with the files at the end."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from pa_fast import files
from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.sweep import journal, manifest, results
from pa_fast.sweep.entry import Entry, Shard
from pa_fast.sweep.journal import Journal
from pa_fast.sweep.manifest import Manifest
from pa_fast.sweep.point import Record
from pa_fast.sweep.progress import Progress, listening
from pa_fast.sweep.results import SweepResult


class Recording:
    """A context manager that writes the points of one sweep to its run folder, whether one process
    evaluates them or many.

    Its exit, also by an interrupt, writes `results.csv` and `results.json`, whose content is then
    in `result`.

    Args:
        out: the run folder.
        points: the whole schedule.
        now: `manifest.describe` of the process that evaluates.
        overwrite, progress, shard: see `pa_fast.sweep`.

    Raises:
        RunError, OutputError, UsageError: see `pa_fast.sweep`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        points: Sequence[Lambda],
        now: Manifest,
        *,
        overwrite: bool = False,
        progress: Progress | object | None = None,
        shard: Shard | None = None,
    ):
        if shard is not None and overwrite:
            raise UsageError(
                "overwrite and shard together",
                "a shard would remove what others have written: remove the folder first",
            )
        # an evaluator may change the working directory
        self.folder = pathlib.Path(os.path.abspath(out))
        self.progress: Progress = listening(progress)
        self.result: SweepResult | None = None
        self._points = list(points) if shard is None else shard.of(points)
        self._now = now
        self._names = [column.name for column in now.evaluators]
        self._journal = Journal(self.folder, overwrite=overwrite, shard=shard)
        self._noted: set[tuple[str, str]] = set()

    def __enter__(self) -> Recording:
        self._journal.__enter__()
        try:
            self.join(replace(self._now, commands=(manifest.command(),)))
            total = len(self._points) * len(self._names)
            self.progress.begin(total, total - sum(len(names) for _, names in self.missing()))
        except BaseException as error:
            self._journal.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.progress.end()
            # shards end together: the last one writes the lines of all
            with files.locked(self.folder / journal.LOCK):
                loaded = results.load(self.folder)
                results.write(loaded)
            scheduled = {(lam.key, name) for lam in self._points for name in self._names}
            self.result = replace(
                loaded,
                failures=tuple(f for f in loaded.failures if (f.lam.key, f.evaluator) in scheduled),
            )
        finally:
            self._journal.__exit__(kind, error, trace)

    def join(self, now: Manifest) -> None:
        """Add the manifest `now` of another process to `run.json`.

        Raises:
            RunError: it is of another sweep; the difference is named.
        """
        with files.locked(self.folder / journal.LOCK):
            manifest.reconcile(self.folder, now, self._journal.evaluators())

    def missing(self) -> list[tuple[Lambda, list[str]]]:
        """Return each λ that has evaluators without a finished point, in the order of the schedule,
        and their names."""
        unfinished = [
            (lam, [n for n in self._names if self._journal.finished(lam.key, n) is None])
            for lam in self._points
        ]
        return [(lam, names) for lam, names in unfinished if names]

    def scored(self) -> list[str]:
        """Return the evaluators that have a finished point."""
        return sorted(self._journal.evaluators())

    def checksum(self, lam: Lambda) -> int | None:
        """Return the checksum of the weights on which points of `lam` were finished, None where
        none is."""
        return self._journal.checksum(lam.key)

    def record(self, record: Record) -> Entry:
        """Write `record` to disk, then call `progress.recorded`. A score of another unit or number
        of items than its column is recorded as failed."""
        record = self._alike(record)
        entry = self._journal.record(record.entry, record.items, record.files)
        self._note_restored(entry)
        self.progress.recorded(entry)
        return entry

    def _note_restored(self, entry: Entry) -> None:
        """Show a note on each kind of process state that an evaluator changes, once for each
        evaluator."""
        kinds = [
            kind for kind in entry.restored or () if (entry.evaluator, kind) not in self._noted
        ]
        self._noted.update((entry.evaluator, kind) for kind in kinds)
        if kinds:
            self.progress.noted(
                f"evaluator `{entry.evaluator}` changes the {' and the '.join(kinds)} of this"
                " process: put back after each evaluation, so that no other score depends on it"
            )

    def _alike(self, record: Record) -> Record:
        """Return `record`, or a failure where it is in another unit, or of another number of items,
        than its column."""
        entry, known = record.entry, self._journal.sample(record.entry.evaluator)
        if not entry.finished or known is None or (entry.unit, entry.n) == (known.unit, known.n):
            return record
        message = (
            f"evaluator `{entry.evaluator}` scored {entry.n} items in `{entry.unit}`, and {known.n}"
            f" in `{known.unit}` at λ = {known.lam}\n\nhint: points are compared along λ: score the"
            " same items in the same unit at each"
        )
        return Record(replace(entry, score=None, unit=None, n=None, details=None, error=message))

    def draw(self) -> None:
        """Draw `trajectory.svg`, `.png` and `.pdf` from the current journal."""
        from pa_fast.sweep import figure

        with files.locked(self.folder / journal.LOCK):
            why_not = figure.write(results.load(self.folder))
        if why_not:
            self.progress.noted(why_not)

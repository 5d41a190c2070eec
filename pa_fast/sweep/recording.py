"""A run folder while points are added to it: what is missing, what came of each, and the files at
the end."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.sweep import durable, journal, manifest, results
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.journal import Journal
from pa_fast.sweep.manifest import Manifest
from pa_fast.sweep.point import Record
from pa_fast.sweep.progress import Progress, listening
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.shard import Shard


class Recording:
    """The points of one sweep on their way into its run folder, as a context manager.

    Whoever evaluates them, one process or many, records through this. Leaving it, also by an
    interrupt, writes `results.csv` and `results.json`; `result` is theirs.

    Args:
        out: the run folder.
        points: the whole schedule.
        now: `manifest.describe` of the process that evaluates.
        overwrite, progress, shard: see `pa_fast.sweep`.
        proven: see `manifest.reconcile`.

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
        proven: bool = False,
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
        self._proven = proven
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
            # Shards end together: whoever is last holds every line while it writes
            with durable.locked(self.folder / journal.LOCK):
                found = results.load(self.folder)
                results.write(found)
            asked = {(lam.key, name) for lam in self._points for name in self._names}
            self.result = replace(
                found,
                failures=tuple(f for f in found.failures if (f.lam.key, f.evaluator) in asked),
            )
        finally:
            self._journal.__exit__(kind, error, trace)

    def join(self, now: Manifest) -> None:
        """Add what `now` says of one more process to `run.json`.

        Raises:
            RunError: it would run another sweep; what differs is named.
        """
        with durable.locked(self.folder / journal.LOCK):
            manifest.reconcile(self.folder, now, self._journal.evaluators(), proven=self._proven)

    def missing(self) -> list[tuple[Lambda, list[str]]]:
        """Each λ that has evaluators without a finished point, in the order of the schedule, and
        their names."""
        left = [
            (lam, [n for n in self._names if self._journal.finished(lam.key, n) is None])
            for lam in self._points
        ]
        return [(lam, names) for lam, names in left if names]

    def scored(self) -> list[str]:
        """Evaluators that have a finished point."""
        return sorted(self._journal.evaluators())

    def checksum(self, lam: Lambda) -> int | None:
        """The checksum of the weights on which points of `lam` were finished, None where none
        is."""
        return self._journal.checksum(lam.key)

    def record(self, record: Record) -> Entry:
        """Make `record` durable, then tell the progress. A score that is none of its column's
        counts as failed."""
        record = self._alike(record)
        entry = self._journal.record(record.entry, record.items, record.files)
        self._note_restored(entry)
        self.progress.recorded(entry)
        return entry

    def _note_restored(self, entry: Entry) -> None:
        """Tell of each kind of process state that an evaluator changes, once for each of its
        evaluators."""
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
        """`record`, or its failure where it is in another unit, or over another number of items,
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
        """Draw `trajectory.svg`, `.png` and `.pdf` from the journal as it is now."""
        from pa_fast.sweep import figure

        with durable.locked(self.folder / journal.LOCK):
            why_not = figure.write(results.load(self.folder))
        if why_not:
            self.progress.noted(why_not)

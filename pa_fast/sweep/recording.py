"""Recordings: run folders to which points are added, with the files at the end."""

from __future__ import annotations

import os
import pathlib
import time
from collections import Counter
from dataclasses import replace
from types import TracebackType

from pa_fast import files
from pa_fast.base import INSTRUCT, Lambda
from pa_fast.errors import UsageError
from pa_fast.sweep import adaptive, journal, manifest, results
from pa_fast.sweep.entry import JournalEntry, Shard
from pa_fast.sweep.journal import Journal
from pa_fast.sweep.manifest import Manifest
from pa_fast.sweep.point import Record
from pa_fast.sweep.progress import Progress, listening
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule

_LOOK_S = 1.0
"""Pause between two looks at the journals of other shards."""


class Recording:
    """A context manager that writes the points of one sweep to its run folder, whether one process
    evaluates them or many.

    Its exit, also by an interrupt, writes `results.csv` and `results.json`, whose content is then
    in `result`.

    Args:
        out: the run folder.
        schedule: the whole schedule, of all shards.
        now: `manifest.describe` of the process that evaluates.
        overwrite, progress, shard: see `pa_fast.sweep`.

    Raises:
        RunError, OutputError, UsageError, StatisticsError: see `pa_fast.sweep`.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        schedule: Schedule,
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
        self._schedule, self._shard = schedule, shard
        self._scheduled = list(schedule.points)
        self._points = self._own(self._scheduled)
        self._now = now
        self._names = [column.name for column in now.evaluators]
        check_reference(schedule, self.folder, overwrite)
        self._measured = {name: False for name in schedule.measured(self._names)}
        self._journal = Journal(self.folder, overwrite=overwrite, shard=shard)
        self._noted: set[tuple[str, str]] = set()
        self._tried: set[tuple[str, str]] = set()
        self._failed: Counter[tuple[str, str]] = Counter()  # attempts of earlier sweeps

    def _own(self, points: list[Lambda]) -> list[Lambda]:
        return list(points) if self._shard is None else self._shard.of(points)

    def __enter__(self) -> Recording:
        self._journal.__enter__()
        try:
            self._failed = _failures(journal.read(self.folder))
            for name in self._measured:
                if (sample := self._journal.sample(name)) is not None:
                    self._check_items(sample)
            self.join(replace(self._now, commands=(manifest.command(),)))
            missing = sum(len(names) for _, names in self.missing())
            self.progress.begin(self._total(), self._total() - missing)
            higher = {column.name: column.higher_is_better for column in self._now.evaluators}
            self.progress.resumed(self._finished(), higher)
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
        and their names; without points that have failed since this recording began."""
        unfinished = [
            (
                lam,
                [
                    name
                    for name in self._names
                    if self._journal.finished(lam.key, name) is None
                    and (lam.key, name) not in self._tried
                ],
            )
            for lam in self._points
        ]
        return [(lam, names) for lam, names in unfinished if names]

    def extend(self) -> bool:
        """Add the λ that an adaptive schedule asks for after the scores so far, and return whether
        there are any; a fixed schedule asks for none.

        The reason is shown. A shard first waits for the points of the others: all of them add the
        same λ, and each evaluates its part.

        Raises:
            StatisticsError, RunError: see `adaptive.following`.
        """
        if not self._schedule.is_adaptive or not self._has_ended():
            return False
        lams, why = adaptive.following(self._schedule, results.load(self.folder), self._scheduled)
        if not lams:
            self.progress.noted(f"no λ is added: {why}")
            return False
        self._scheduled += lams
        self._points += self._own(lams)
        self.join(replace(self._now, lambdas=tuple(lam.key for lam in self._scheduled)))
        listed = ", ".join(lam.key for lam in lams)
        self.progress.extended(self._total(), f"λ = {listed} added: {why}")
        return True

    def _finished(self) -> list[JournalEntry]:
        """Return the finished points of this schedule."""
        attempts = (self._journal.finished(lam.key, n) for lam in self._points for n in self._names)
        return [entry for entry in attempts if entry is not None]

    def _total(self) -> int:
        return len(self._points) * len(self._names)

    def _has_ended(self) -> bool:
        """Wait until every shard has tried the points on which the next λ depend; return whether
        they are all finished."""
        needed = self._schedule.needed(self._names)
        points = {(lam.key, name) for lam in self._scheduled for name in needed}
        is_noted = False
        while True:
            entries = journal.read(self.folder)
            missing = points - {(e.lam, e.evaluator) for e in entries if e.finished}
            if not missing:
                return True
            own = {(lam.key, name) for lam in self._points for name in needed}
            failed = _failures(entries)
            stopped = (missing & own) or {
                point for point in missing if failed[point] > self._failed[point]
            }
            if stopped:
                lam, name = min(stopped)
                self.progress.noted(f"no λ is added: `{name}` has no score at λ = {lam}")
                return False
            if not is_noted:
                waited = sorted({lam for lam, _ in missing}, key=lambda key: Lambda(key).exact)
                self.progress.noted(f"waiting for λ = {', '.join(waited)} of other shards")
                is_noted = True
            time.sleep(_LOOK_S)

    def scored(self) -> list[str]:
        """Return the evaluators that have a finished point."""
        return sorted(self._journal.evaluators())

    def checksum(self, lam: Lambda) -> int | None:
        """Return the checksum of the weights on which points of `lam` were finished, None where
        none is."""
        return self._journal.checksum(lam.key)

    def record(self, record: Record) -> JournalEntry:
        """Write `record` to disk, then call `progress.recorded`. A score of another unit or number
        of items than its column is recorded as failed.

        Raises:
            StatisticsError: the schedule needs items, and those of the first score do not make it
                up.
        """
        record = self._alike(record)
        entry = self._journal.record(record.entry, record.items, record.files)
        if not entry.finished:
            self._tried.add((entry.lam, entry.evaluator))
        self._note_restored(entry)
        self.progress.recorded(entry)
        if entry.finished and not self._measured.get(entry.evaluator, True):
            self._check_items(entry)
        return entry

    def _check_items(self, entry: JournalEntry) -> None:
        """Check the items of the first score of an evaluator that the schedule needs, so that an
        hour of further λ is not in vain.

        Raises:
            StatisticsError: they do not make up the score.
        """
        assert entry.score is not None
        higher = {column.name: column.higher_is_better for column in self._now.evaluators}
        column = journal.read_items(self.folder, entry.items, entry.score)
        adaptive.check_column(entry.evaluator, Lambda(entry.lam), column, higher[entry.evaluator])
        self._measured[entry.evaluator] = True

    def _note_restored(self, entry: JournalEntry) -> None:
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


def check_reference(schedule: Schedule, folder: pathlib.Path, overwrite: bool) -> None:
    """Check that evaluators that must keep a share of their score at λ = 1 will have that score.

    Args:
        overwrite: start afresh, so that scores in `folder` do not count.

    Raises:
        UsageError: neither the schedule nor the run folder has it.
    """
    if not schedule.keep or INSTRUCT in schedule.points:
        return
    is_begun = not overwrite and (folder / journal.NAME).exists()
    entries = journal.read(folder) if is_begun else []
    known = {e.evaluator for e in entries if e.finished and e.lam == INSTRUCT.key}
    for name, share in schedule.keep.items():
        if name not in known:
            raise UsageError(
                f"`{name}` is to keep {100 * share:g} % of its score at λ = 1, and this sweep does"
                " not evaluate λ = 1",
                "add λ = 1 to the schedule: 0.2,0.6,1, or a range that ends there such as 0:1:0.1",
            )


def _failures(entries: list[JournalEntry]) -> Counter[tuple[str, str]]:
    """Return how many attempts of each point failed."""
    return Counter((entry.lam, entry.evaluator) for entry in entries if not entry.finished)

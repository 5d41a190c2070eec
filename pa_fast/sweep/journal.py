"""The journal of a run folder: every attempt, in order, durable before the next one starts."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from pa_fast.base import Item
from pa_fast.errors import OutputError, RunError
from pa_fast.sweep import durable
from pa_fast.sweep.entry import Entry, parse

NAME = "journal.jsonl"
ITEMS = "items"
RUN_FILES = ("run.json", "results.csv", "results.json", "trajectory.svg", "trajectory.png")


class Journal:
    """A run folder held open by one sweep, as a context manager.

    Entering creates the folder, locks it against other sweeps, cuts off a last line that a kill left torn, and reads
    what is finished. With `overwrite`, the files of the former sweep are removed first, and no others.

    Raises:
        RunError: the folder holds foreign files, is in use, or its journal is damaged before its last line.
        OutputError: it cannot be created or written.
    """

    def __init__(self, folder: pathlib.Path, *, overwrite: bool = False):
        self.folder = folder
        self._overwrite = overwrite
        self._file = -1
        self._finished: dict[tuple[str, str], Entry] = {}
        self._checksums: dict[str, int] = {}

    def __enter__(self) -> Journal:
        path = self.folder / NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(self.folder)
            (self.folder / ITEMS).mkdir(exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be used as a run folder: {error.strerror}", "choose another --out"
            ) from error
        try:
            self._lock()
            if self._overwrite:
                self._clear()
            for folder in (self.folder, self.folder / ITEMS):
                durable.remove_temporaries(folder)
            entries, whole_bytes = _scan(path)
            os.ftruncate(self._file, whole_bytes)
            durable.sync_folder(self.folder)
        except BaseException:
            self._close()
            raise
        for entry in entries:
            self._note(entry)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def finished(self, lam: str, evaluator: str) -> Entry | None:
        """The entry that finished `evaluator` at the λ of key `lam`, in this sweep or an earlier one."""
        return self._finished.get((lam, evaluator))

    def evaluators(self) -> set[str]:
        """Names of the evaluators that have a finished point."""
        return {evaluator for _, evaluator in self._finished}

    def checksum(self, lam: str) -> int | None:
        """The checksum of the weights on which points at the λ of key `lam` were finished."""
        return self._checksums.get(lam)

    def record(self, entry: Entry, items: Sequence[Item] = ()) -> Entry:
        """Write `items` to a file of their own, then append `entry`; return it with the name of that file.

        An interrupt (SIGINT) that arrives meanwhile is raised when the line is durable.

        Raises:
            OutputError: disk full or gone; the journal then ends with the line before.
        """
        with _interrupts_wait():
            if items:
                name = _item_file(entry.lam, entry.evaluator)
                lines = [json.dumps({"id": i.id, "group": i.group, "score": i.score}, allow_nan=False) for i in items]
                durable.write(self.folder / ITEMS / name, "".join(f"{line}\n" for line in lines).encode())
                entry = replace(entry, items=f"{ITEMS}/{name}")
            self._append(entry.line())
            self._note(entry)
        return entry

    def _note(self, entry: Entry) -> None:
        if entry.finished:
            self._finished.setdefault((entry.lam, entry.evaluator), entry)
            if entry.checksum is not None:
                self._checksums.setdefault(entry.lam, entry.checksum)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            hint = "make room or grant access, then run again: finished points are kept"
            raise OutputError(f"{self.folder / NAME} cannot be written: {error.strerror}", hint) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.folder} is in use by another sweep", "wait for it to end, or choose another --out") from None
        except OSError as error:
            raise RunError(f"{self.folder} cannot be locked: {error.strerror}", "put --out on a local disk") from error

    def _clear(self) -> None:
        # The journal first: lines without the run.json that explains them would be refused by the next sweep
        os.ftruncate(self._file, 0)
        os.fsync(self._file)
        for path in (self.folder / ITEMS).glob("*.jsonl"):
            path.unlink()
        # run.json last: a folder without it that holds anything else is taken for somebody else's
        for name in sorted(RUN_FILES, key=lambda name: name == "run.json"):
            (self.folder / name).unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1


def read(folder: pathlib.Path) -> list[Entry]:
    """All entries of the journal in `folder`, in order, without its torn last line; needs no lock, writes nothing.

    Raises:
        RunError: no journal, or one that is damaged before its last line.
    """
    return _scan(folder / NAME)[0]


def _scan(path: pathlib.Path) -> tuple[list[Entry], int]:
    """The entries at `path`, and how many bytes their lines take."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", "name the --out of a sweep") from error
    entries: list[Entry] = []
    whole_bytes = 0
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entries.append(parse(line))
        except ValueError as error:
            if number == len(lines) and not torn:
                break  # the write of the last line was cut short by a power cut, with its newline already on disk
            hint = f"restore {path.name} from a copy, or delete the line: its point then runs again"
            raise RunError(f"line {number} of {path} is damaged: it {_why(error)}", hint) from error
        whole_bytes += len(line) + 1
    return entries, whole_bytes


def _why(error: ValueError) -> str:
    return "is not JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)


def _refuse_foreign(folder: pathlib.Path) -> None:
    if (folder / "run.json").exists():
        return
    journal = folder / NAME
    for path in folder.iterdir():
        # A sweep killed in its first moments leaves these, with nothing in them, before run.json is there
        empty_journal = path == journal and path.stat().st_size == 0
        empty_items = path == folder / ITEMS and path.is_dir() and not any(path.iterdir())
        if not (empty_journal or empty_items or re.fullmatch(r"\.run\.json\.\d+\.tmp", path.name)):
            raise RunError(
                f"{folder} is not a run folder: it holds `{path.name}` and no run.json", "choose a new folder for --out"
            )


def _item_file(lam: str, evaluator: str) -> str:
    """A file name for the items of a point: readable, and different for different points on every file system."""
    plain = f"lambda={lam}.{evaluator}"
    safe = re.sub(r"[^A-Za-z0-9.=_-]+", "_", plain)
    mark = "" if safe == plain.lower() and len(plain) <= 100 else "." + hashlib.sha256(plain.encode()).hexdigest()[:12]
    return f"{safe[:100]}{mark}.jsonl"


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold back SIGINT until the block is done. Only the main thread is ever interrupted, so only it needs this."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[-1])

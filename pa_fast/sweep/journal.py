"""The journal of a run folder: every attempt, in order, on disk before the next one starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pa_fast import files
from pa_fast.base import Item
from pa_fast.errors import OutputError, RunError
from pa_fast.sweep import manifest
from pa_fast.sweep.entry import JournalEntry, Shard, parse

if TYPE_CHECKING:
    from pa_fast.stats.items import Column

NAME = "journal.jsonl"
ITEMS = "items"
OUTPUTS = "outputs"
_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND
LOCK = ".lock"
"""Lock file, held while files that all shards of a sweep share are written."""
_NO_RUN = "choose a new folder for --out; or if this is a run, restore its run.json from a copy"
_RESTORE_ITEMS = "restore it from a copy; or delete the point's line in the journal: it runs again"
_KEPT = "make room or grant access, then run again: finished points are kept"
REPORT_FILES = ("report.html", "statistics.csv", "statistics.json")
PAIR = "pair.json"
"""Sizes of the pair's delta, of `inspect --run`."""
RUN_FILES = (
    PAIR,
    "run.json",
    "results.csv",
    "results.json",
    "trajectory.svg",
    "trajectory.png",
    "trajectory.pdf",
    *REPORT_FILES,
)


class Journal:
    """A run folder held open by one sweep, as a context manager.

    Entering creates the folder, locks it against other sweeps, removes a last line that a kill cut
    short, and reads the finished points; processes that start together do this one after another.
    With `overwrite`, the files of the former sweep are removed first, and no others.

    A `shard` writes a file of its own, `journal.I-of-N.jsonl`, and shares the folder with the
    others; finished points are read from all files. The shards may run on several hosts with one
    file system.

    Raises:
        RunError: the folder holds foreign files, is in use, or its journal is damaged before its
            last line.
        OutputError: it cannot be created or written.
    """

    def __init__(
        self, folder: pathlib.Path, *, overwrite: bool = False, shard: Shard | None = None
    ):
        self.folder = folder
        self._overwrite = overwrite
        self._shard = shard
        self._path = folder / (NAME if shard is None else f"journal.{shard.name}.jsonl")
        self._file = self._shared = -1
        self._finished: dict[tuple[str, str], JournalEntry] = {}
        self._checksums: dict[str, int] = {}
        self._samples: dict[str, JournalEntry] = {}

    def __enter__(self) -> Journal:
        # before the first file: a foreign folder stays as it is
        check_folder(self.folder, self._shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.locked(self.folder / LOCK):
                entries = self._open()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise _unusable(self.folder, error.strerror) from error
            raise
        for entry in entries:
            self._note(entry)
        return self

    def _open(self) -> list[JournalEntry]:
        """Create, lock and repair the files; return all entries."""
        _check_foreign(self.folder)
        for name in (ITEMS, OUTPUTS):
            files.check_own_folder(self.folder / name)
        (self.folder / ITEMS).mkdir(exist_ok=True)
        self._file = _open(self._path)
        self._shared = self._file if self._shard is None else _open(self.folder / NAME)
        self._lock()
        if self._overwrite:
            self._clear()
        if self._shard is None:
            # a shard cannot tell leftovers of a kill from files that another one is writing
            for folder in (self.folder, self.folder / ITEMS, *_outputs(self.folder)):
                files.remove_temporaries(folder)
        os.ftruncate(self._file, _scan(self._path)[1])
        files.sync_folder(self.folder)
        return read(self.folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def finished(self, lam: str, evaluator: str) -> JournalEntry | None:
        """Return the entry that finished `evaluator` at the λ of key `lam`, in this sweep or an
        earlier one."""
        return self._finished.get((lam, evaluator))

    def sample(self, evaluator: str) -> JournalEntry | None:
        """Return an entry that finished `evaluator` at some λ."""
        return self._samples.get(evaluator)

    def evaluators(self) -> set[str]:
        """Return the names of the evaluators that have a finished point."""
        return {evaluator for _, evaluator in self._finished}

    def checksum(self, lam: str) -> int | None:
        """Return the checksum of the weights on which points at the λ of key `lam` were
        finished."""
        return self._checksums.get(lam)

    def record(
        self,
        entry: JournalEntry,
        items: Sequence[Item] = (),
        outputs: Mapping[str, str] | None = None,
    ) -> JournalEntry:
        """Write `items` to a file and `outputs`, texts by name, to a folder of their own, then
        append `entry`; return it with their names.

        An interrupt (SIGINT) meanwhile is raised once the line is on disk.

        Raises:
            OutputError: disk full or gone; the journal then ends with the previous line.
        """
        with _interrupts_wait():
            if items:
                name = _point(entry.lam, entry.evaluator) + ".jsonl"
                text = "".join(map(_item_line, items))
                files.write(self.folder / ITEMS / name, text.encode())
                entry = replace(entry, items=f"{ITEMS}/{name}")
            if outputs:
                name = f"{OUTPUTS}/{_point(entry.lam, entry.evaluator)}"
                self._make_folder(name, outputs)
                for file, text in outputs.items():
                    files.write(self.folder / name / file, text.encode("utf-8", "surrogatepass"))
                entry = replace(entry, outputs=name)
            self._append(entry.line())
            self._note(entry)
        return entry

    def _note(self, entry: JournalEntry) -> None:
        if entry.finished:
            self._finished.setdefault((entry.lam, entry.evaluator), entry)
            self._samples.setdefault(entry.evaluator, entry)
            if entry.checksum is not None:
                self._checksums.setdefault(entry.lam, entry.checksum)

    def _make_folder(self, name: str, kept: Container[str]) -> None:
        """Make a point's folder. What an attempt left in it that was killed, and is not `kept`, is
        removed: names may hold a date."""
        try:
            for folder in ((self.folder / name).parent, self.folder / name):
                files.check_own_folder(folder)
                folder.mkdir(exist_ok=True)
                files.sync_folder(folder.parent)
            for path in (self.folder / name).iterdir():
                if path.name not in kept and not path.is_dir():
                    path.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.folder / name} cannot be made: {error.strerror}", _KEPT
            ) from error

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
            raise OutputError(f"{self._path} cannot be written: {error.strerror}", _KEPT) from error

    def _lock(self) -> None:
        _take(self._file, self._path, self._shard)
        if self._shard is not None:
            _take(self._shared, self.folder / NAME, self._shard, shared=True)

    def _clear(self) -> None:
        # the journal first: the next sweep would refuse lines without the run.json of their sweep
        os.ftruncate(self._file, 0)
        os.fsync(self._file)
        for path in [
            *self.folder.glob("journal.*-of-*.jsonl"),
            *(self.folder / ITEMS).glob("lambda=*.jsonl"),
        ]:
            path.unlink()
        for path in _outputs(self.folder):
            shutil.rmtree(path)
        # run.json last: a folder with other files and without it counts as foreign
        for name in sorted(RUN_FILES, key=lambda name: name == "run.json"):
            (self.folder / name).unlink(missing_ok=True)

    def _close(self) -> None:
        for handle in {self._file, self._shared}:
            files.release(handle)
        self._file = self._shared = -1


def check_folder(folder: pathlib.Path, shard: Shard | None = None) -> None:
    """Check that `folder` is, or can become, a run folder, without writing to it.

    Raises:
        RunError: it holds foreign files, or is in use.
        OutputError: it is no folder, or neither it nor the folder that it would be made in may be
            written.
    """
    try:
        if folder.exists():
            _check_foreign(folder)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise _unusable(folder, f"{existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise _unusable(folder, f"{existing} may not be written")
        if (folder / NAME).exists():
            with os.fdopen(files.open_own(folder / NAME, os.O_RDONLY), "rb") as journal:
                _take(journal.fileno(), folder / NAME, shard, shared=shard is not None)
    except OSError as error:
        raise _unusable(folder, error.strerror) from error


def _take(handle: int, path: pathlib.Path, shard: Shard | None, *, shared: bool = False) -> None:
    folder = path.parent
    try:
        files.lock(handle, path, shared=shared)
    except BlockingIOError:
        which = (
            "another sweep"
            if shard is None
            else f"another sweep, or by another process for shard {shard.name}"
        )
        raise RunError(
            f"{folder} is in use by {which}", "wait for it to end, or choose another --out"
        ) from None
    except OSError as error:
        raise RunError(
            f"{folder} cannot be locked: {error.strerror}", "put --out on a local disk"
        ) from error


def _unusable(folder: pathlib.Path, why: str | None) -> OutputError:
    return OutputError(f"{folder} cannot be used as a run folder: {why}", "choose another --out")


def read(folder: pathlib.Path) -> list[JournalEntry]:
    """Return all entries of the journals in `folder`, those of shards after the others, each file
    in order and without an incomplete last line; needs no lock, writes nothing.

    Raises:
        RunError: no journal, or one that is damaged before its last line.
    """
    return [
        entry
        for path in [folder / NAME, *sorted(folder.glob("journal.*-of-*.jsonl"))]
        for entry in _scan(path)[0]
    ]


def read_items(folder: pathlib.Path, name: str | None, value: float) -> Column:
    """Return the items in the file `name` of the run `folder`, which make up `value`; none without
    a file.

    Raises:
        RunError: the file is missing or damaged.
    """
    from pa_fast.stats.items import Column

    if name is None:
        return Column(value, (), (), (), ())
    path = folder / name
    try:
        if not re.fullmatch(rf"{ITEMS}/[^/\\]+", name):
            raise ValueError("it is not in the folder of items")
        files.check_own_folder(folder / ITEMS)
        # one document of all lines: parsed in a fifth of the time that it takes line by line
        text = files.read_own(path).decode().strip().replace("\n", ",\n")
        rows = json.loads(f"[{text}]")
        parts = [_parts(row["parts"]) if "parts" in row else None for row in rows]
        return Column(
            value,
            [str(row["id"]) for row in rows],
            [str(row["group"]) for row in rows],
            [float(row["score"]) for row in rows],
            [float(row.get("weight", 1)) for row in rows],
            parts if any(parts) else (),
        )
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", _RESTORE_ITEMS) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}", _RESTORE_ITEMS) from error


def _parts(value: Any) -> dict[str, float] | None:
    return None if value is None else {str(key): float(part) for key, part in value.items()}


_ENCODED = json.JSONEncoder(allow_nan=False).encode
"""As `json.dumps`, which makes an encoder each time: a sweep writes millions of items."""


def _item_line(item: Item) -> str:
    fields: dict[str, Any] = {"id": item.id, "group": item.group, "score": item.score}
    fields |= {} if item.weight == 1 else {"weight": item.weight}
    fields |= {} if item.parts is None else {"parts": dict(item.parts)}
    return _ENCODED(fields) + "\n"


def _outputs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders of points in the run `folder`, links left out."""
    return [
        path
        for path in (folder / OUTPUTS).glob("lambda=*")
        if path.is_dir() and not path.is_symlink()
    ]


def _open(path: pathlib.Path) -> int:
    return files.hold(files.open_own(path, _APPEND))


def _scan(path: pathlib.Path) -> tuple[list[JournalEntry], int]:
    """Return the entries at `path`, and the number of bytes of their lines."""
    try:
        data = files.read_own(path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {error.strerror}", "name the --out of a sweep"
        ) from error
    entries: list[JournalEntry] = []
    whole_bytes = 0
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entries.append(parse(line))
        except ValueError as error:
            if number == len(lines) and not torn:
                # a power cut left the last line incomplete, but with its newline
                break
            hint = f"restore {path.name} from a copy, or delete the line: its point then runs again"
            raise RunError(f"line {number} of {path} is damaged: it {_why(error)}", hint) from error
        whole_bytes += len(line) + 1
    return entries, whole_bytes


def _why(error: ValueError) -> str:
    return (
        "is not JSON"
        if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        else str(error)
    )


def _check_foreign(folder: pathlib.Path) -> None:
    if manifest.is_recorded(folder):
        return
    if os.path.lexists(folder / "run.json"):
        raise RunError(f"{folder} is not a run folder: its run.json is no sweep's", _NO_RUN)
    for path in folder.iterdir():
        # a sweep killed at its start leaves these, empty, before it writes run.json
        names = r"journal(\.\d+-of-\d+)?\.jsonl|\.lock"
        empty_file = re.fullmatch(names, path.name) and path.is_file() and path.stat().st_size == 0
        empty_items = path == folder / ITEMS and path.is_dir() and not any(path.iterdir())
        if not (
            empty_file
            or empty_items
            or re.fullmatch(r"\.run\.json\.\d+\.tmp", path.name)
            or not path.exists()
        ):
            if (folder / "run.json").exists():
                # another process has started the run meanwhile
                return
            raise RunError(
                f"{folder} is not a run folder: it holds `{path.name}` and no run.json",
                "choose a new folder for --out",
            )


def _point(lam: str, evaluator: str) -> str:
    """Return the file name of a point: readable, and different for different points on every file
    system."""
    plain = f"lambda={lam}.{evaluator}"
    safe = re.sub(r"[^A-Za-z0-9.=_-]+", "_", plain)
    mark = (
        ""
        if safe == plain.lower() and len(plain) <= 100
        else "." + hashlib.sha256(plain.encode()).hexdigest()[:12]
    )
    return f"{safe[:100]}{mark}"


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Delay SIGINT to the end of the block. Does nothing in other threads than the main one, which
    alone is interrupted."""
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

"""An output folder that appears complete or not at all.

    .NAME.pa_fast.partial   filled beside the target, renamed to NAME at the end
    .NAME.pa_fast.lock      held (flock) by the one process that may touch the others
    .NAME.pa_fast.old       the replaced folder, between the two renames of an overwrite

A killed run leaves the partial folder, which no loader accepts: shards carry a `.partial` suffix
until they are complete, and config.json comes last. The next run into the same target keeps the
shards that `ShardLog` lists as complete, if it is the same job, and removes everything else. If the
killed run was between the two renames, the old folder is moved back. A folder of that name that has
no log, and files that are not of a checkpoint, is not a killed run's, and is refused.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pa_fast import files
from pa_fast.checkpoint.folder import Companion
from pa_fast.checkpoint.layout import (
    ShardLog,
    ShardPlan,
    Slot,
    Sums,
    check_apart,
    check_replaceable,
    foreign_names,
)
from pa_fast.checkpoint.safetensors import DTYPE_BITS, memory, quoted
from pa_fast.errors import DataError, OutputError
from pa_fast.units import format_bytes

if TYPE_CHECKING:
    import torch


_UNFINISHED = ".partial"
_ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
_SYNC_BYTES = 128 * 2**20
_SPARE_BYTES = 64 * 2**20  # tokenizer, configuration, file system overhead


class OutputFolder:
    """The target folder while it is written: write into `path`, then `commit`.

    An error leaves nothing behind. An interrupt leaves the complete shards of a job that can be
    continued.

    Args:
        target: the folder to create; its parents are created.
        need_bytes: bytes that it will hold, checked against the free space first.
        overwrite: replace an existing checkpoint folder, if it holds nothing else; it stays in
            place until the new one is complete.
        job: text over everything that decides the bytes of the shards, so that another run of the
            same job can continue from them; None starts every run afresh.
        sources: folders and files that are read meanwhile, and must not be replaced.

    Attributes:
        complete: file → checksums of the shards that an unfinished run of this job left. Verify
            before use.

    Raises:
        OutputError: the target is not empty, is not a folder, holds a source, is being written by
            another process, or cannot be written; the disk is too small (with the figures); or a
            link has one of the hidden names.
    """

    def __init__(
        self,
        target: str | Path,
        need_bytes: int,
        *,
        overwrite: bool = False,
        job: str | None = None,
        sources: Iterable[Path] = (),
    ):
        self.target = Path(os.path.realpath(Path(target).expanduser()))
        if not self.target.name:
            raise OutputError(
                f"{target}: found the root folder, expected a new folder", "choose another --out"
            )
        self.path = self.target.with_name(f".{self.target.name}.pa_fast.partial")
        self._old = self.target.with_name(f".{self.target.name}.pa_fast.old")
        self._lock = self.target.with_name(f".{self.target.name}.pa_fast.lock")
        self._overwrite = overwrite
        self._need_bytes = need_bytes
        self._sources = list(sources)
        self._fd = -1
        self._keep = False
        self._can_resume = job is not None
        self._log = ShardLog(self.path, job or "")
        self.complete: dict[str, dict[str, Sums]] = {}

    def __enter__(self) -> OutputFolder:
        with output_errors(self.target):
            check_apart([self.target, self.path, self._old], self._sources)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._fd = files.lock_new(self._lock, self.target)
            try:
                self._recover()
                self._check_target()
                self._check_space()
                self.path.mkdir(exist_ok=True)
                self._log.begin()
            except BaseException:
                self._unlock()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            interrupted = kind is not None and not issubclass(kind, Exception)
            kept = (interrupted or self._keep) and self._can_resume and self._log.read()
            if not kept and files.is_named(self._fd, self._lock):
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            self._unlock()

    @contextmanager
    def shard(self, plan: ShardPlan) -> Iterator[ShardFile]:
        """Open the weight file of `plan` for filling. It is synced and gets its final name when the
        block ends without an error.

        Another run of the job verifies the file by the checksums that `file.sums` then has.
        """
        partial = self.path / f"{plan.file}{_UNFINISHED}"
        with output_errors(self.path):
            (self.path / plan.file).unlink(missing_ok=True)
            file = ShardFile(partial, plan)
            try:
                yield file
                file.sync()
            finally:
                file.close()
            self._check_held()
            files.rename(partial, self.path / plan.file)
            if self._can_resume:
                self._log.add(plan.file, file.sums)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file and sync it."""
        with output_errors(self.path / name), open(self.path / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, companion: Companion) -> None:
        """Copy `companion` and sync the copy.

        Raises:
            DataError: its length changed since it was listed.
        """
        target = self.path / companion.name
        with output_errors(target):
            target.parent.mkdir(exist_ok=True)
        with output_errors(target), open(target, "xb") as file:
            with companion.open() as source:
                remaining = companion.size_bytes
                while remaining and (data := source.read(min(remaining, 2**20))):
                    remaining -= file.write(data)
                if remaining or source.read(1):
                    raise DataError(
                        f"{companion.path}: the file changed while it was read: found another"
                        f" length than {companion.size_bytes} bytes",
                        "wait until nothing writes to the checkpoint, and run again",
                    )
            file.flush()
            os.fsync(file.fileno())
        if target.parent != self.path:
            files.sync_folder(target.parent)

    def commit(self) -> None:
        """Give the folder its name. After this it is complete, whatever happens."""
        with output_errors(self.target):
            try:
                files.sync_folder(self.path)
            except OSError:
                # its weight files are complete, and another run goes on from them
                self._keep = True
                raise
            self._check_held()
            self._check_target()
            self._log.remove()
            if self._overwrite and self.target.exists():
                files.rename(self.target, self._old)
            try:
                files.rename(self.path, self.target)
            except BaseException:
                if self._old.exists() and not self.target.exists():
                    files.rename(self._old, self.target)
                raise
        if files.sync_finished(self.target.parent):
            # else the old folder stays too: a power cut may undo the renames
            shutil.rmtree(self._old, ignore_errors=True)

    def _recover(self) -> None:
        """Undo the leftovers of a killed run. Under the lock no other process works here."""
        files.check_own_folder(self._old)
        if self._old.exists():
            if self.target.exists() and os.listdir(self.target):
                check_replaceable(self._old)
                shutil.rmtree(self._old)
            else:
                files.rename(self._old, self.target)
        files.check_own_folder(self.path)
        if not self.path.exists():
            return
        foreign = [
            name
            for name in foreign_names(self.path)
            if not name.endswith(_UNFINISHED) and name not in _ADAPTER
        ]
        if foreign and not os.path.lexists(self._log.file):
            raise OutputError(
                f"{self.path}: holds {quoted(foreign[0])}, which pa_fast did not write there",
                "the name is one of pa_fast's own: move the folder elsewhere, or choose another"
                " --out",
            )
        logged = self._log.read() if self._can_resume else {}
        self.complete = {
            file: sums for file, sums in logged.items() if _is_own_file(self.path / file)
        }
        for path in list(self.path.iterdir()):
            if path.name not in self.complete and not (self.complete and path == self._log.file):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise OutputError(
                f"{self.target}: found a file, expected a folder or nothing", "choose another --out"
            )
        names = sorted(os.listdir(self.target))
        if not names:
            return
        message = f"{self.target}: not empty: found {', '.join(names[:3])}"
        if not self._overwrite:
            raise OutputError(message, "choose another --out, or replace it with --overwrite")
        check_replaceable(self.target)

    def _check_held(self) -> None:
        """Refuse to go on if another process has taken the lock file, which can happen on a file
        system without locks."""
        if not files.is_named(self._fd, self._lock):
            raise OutputError(
                f"{self.target}: another process began to write it", "run one at a time"
            )

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.target.parent).free
        bytes_ = (
            self._need_bytes
            + _SPARE_BYTES
            - sum((self.path / file).stat().st_size for file in self.complete)
        )
        if free < bytes_:
            need = format_bytes(bytes_)
            shortage = f"needs {need}, {format_bytes(free)} are free on its disk"
            raise OutputError(
                f"{self.target}: {shortage}", "free some space or choose another disk"
            )

    def _unlock(self) -> None:
        # unlinked while held: a process that opened the old file meanwhile sees that its name is
        # gone, and tries again
        if files.is_named(self._fd, self._lock):
            self._lock.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


class ShardFile:
    """One weight file of known layout, open for writing. Its header is written first, and its space
    is reserved.

    Attributes:
        sums: checksums by tensor, set by the code that fills the file.
    """

    def __init__(self, path: Path, plan: ShardPlan):
        self._slots: dict[str, Slot] = {slot.name: slot for slot in plan.slots}
        self.sums: dict[str, Sums] = {}
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _reserve(self._fd, plan.size_bytes)
            _write(self._fd, memoryview(plan.header), 0)
        except BaseException:
            os.close(self._fd)
            raise
        self._waiting_bytes = 0
        self._syncer = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def write(self, name: str, start: int, data: torch.Tensor) -> None:
        """Write `data` [n], contiguous, as elements `start` to `start + n` of the flattened tensor
        `name`. Threads may call this at once."""
        slot = self._slots[name]
        _write(self._fd, memory(data), slot.start + start * DTYPE_BITS[slot.dtype] // 8)

    def written(self, count: int) -> None:
        """Note that `count` more bytes are final, so that the disk can write them while the next
        are computed."""
        self._waiting_bytes += count
        if self._waiting_bytes < _SYNC_BYTES or (
            self._syncing is not None and not self._syncing.done()
        ):
            return
        if self._syncing is not None:
            self._syncing.result()  # an error of the disk is reported once, here
        self._waiting_bytes = 0
        self._syncing = self._syncer.submit(os.fsync, self._fd)

    def sync(self) -> None:
        """Flush everything written to the disk."""
        if self._syncing is not None:
            self._syncing.result()
        os.fsync(self._fd)

    def close(self) -> None:
        self._syncer.shutdown()
        os.close(self._fd)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        free = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = next((p for p in [path, *path.parents] if p.exists()), path)
            free = f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
        hint = "check the folder's permissions and free space, or choose another --out"
        raise OutputError(
            f"{where}: cannot be written: {error.strerror or error}{free}", hint
        ) from error


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _reserve(fd: int, size_bytes: int) -> None:
    """Give the file its size and, if the file system can, its blocks, so that a disk that is too
    small fails at once."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size_bytes)


def _is_own_file(path: Path) -> bool:
    """Return whether `path` is a plain file, and neither a link nor a second name of another
    file."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1

"""pa_fast's own files: never opened through a link, locked, synced, and complete or absent.

Names of working files can be guessed (`.OUT.pa_fast.partial`, `RUN/journal.jsonl`): anyone who may
write to the folder can put a link there first, and data would be written elsewhere. Every such file
is opened by `open_own`, and every such folder checked by `check_own_folder`. Both refuse a link and
anything else that is not a plain file or folder.

Some file systems (NFS without a lock daemon, Lustre without `-o flock`, some of FUSE) have no
locks, or cannot sync a folder. pa_fast then goes on without, after a warning of the logger
`pa_fast`, once per file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from pa_fast.errors import OutputError, UsageError
from pa_fast.foreign import one_line

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EISDIR}
_PLANTED = "pa_fast did not make it: look at it, and remove it or choose another --out"
_log = logging.getLogger("pa_fast")
_noted: set[tuple[str, int]] = set()


def path_of(given: object, what: str) -> Path:
    """Return `given` as a path; `what` names it in errors.

    Raises:
        UsageError: it is neither text nor a path, is empty, or cannot be the name of a file.
    """
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(
            f"{what}: found {one_line(repr(given), 60)}, expected a path",
            "name a file or folder",
        )
    return Path(text)


def check_outside(output: str | os.PathLike[str], sources: Iterable[object]) -> None:
    """Refuse an output that is the folder of a source or lies in it.

    Args:
        sources: checkpoints as they were given. Those that are not local folders, such as hub ids,
            are skipped.

    Raises:
        OutputError: naming output and source.
    """
    real_path = Path(os.path.realpath(Path(output).expanduser()))
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        folder = os.path.expanduser(source)
        if os.path.isdir(folder) and Path(os.path.realpath(folder)) in (
            real_path,
            *real_path.parents,
        ):
            raise OutputError(
                f"{output}: is or lies in the source {source}, which is only read",
                "choose a place outside of it",
            )


def open_own(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a working file and return its descriptor. It is not truncated, because that must wait
    for the checks here.

    Raises:
        OutputError: there is a link, a pipe or anything else that is not a plain file, or, if
            `flags` may write, a file that has another name too.
        OSError: it cannot be opened.
    """
    try:
        # O_NONBLOCK: a pipe must not wait for its other end; of plain files it changes nothing
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if (
            error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO)
            and (kind := _kind(path)) != "a file"
        ):
            raise OutputError(
                f"{path}: found {kind}, expected a file that pa_fast made, or nothing", _PLANTED
            ) from None
        raise
    status = os.fstat(fd)
    defect = ""
    if not stat.S_ISREG(status.st_mode):
        defect = f"found {_kind(path)}, expected a file that pa_fast made, or nothing"
    elif status.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
        defect = (
            f"the file has {status.st_nlink} names (hard links), and writing would change it under"
            " all of them"
        )
    if defect:
        os.close(fd)
        raise OutputError(f"{path}: {defect}", _PLANTED)
    return fd


def read_own(path: Path) -> bytes:
    """Read the whole working file `path`.

    Raises:
        OutputError: there is a link, a pipe or anything else that is not a plain file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


def check_own_folder(path: Path) -> None:
    """Refuse a link and anything else that is not a folder at the path of a working folder.

    Raises:
        OutputError: naming what was found.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise OutputError(
            f"{path}: found {_kind(path)}, expected a folder that pa_fast made, or nothing",
            _PLANTED,
        )


def is_forbidden(error: OutputError) -> bool:
    """Return whether `error` comes from a folder that may not be written."""
    number = getattr(error.__cause__, "errno", None)
    return number in (errno.EROFS, errno.EACCES, errno.EPERM)


def is_named(fd: int, path: Path) -> bool:
    """Return whether `path` is still a name of the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


def lock(fd: int, path: Path, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock the open file `fd`, called `path`, until it is closed. Return False, with a warning, if
    the file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
        OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(
            fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        )
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _note(
            fd,
            path,
            "has no locks",
            error,
            "nothing keeps a second pa_fast process out: run one at a time there",
        )
        return False
    return True


def lock_new(path: Path, target: Path) -> int:
    """Return a descriptor that holds the lock file `path` of the output `target`, under that name.

    If the file system has no locks, the file is created anew: a process that held it before sees,
    by `is_named`, that the name now belongs to another file.

    Raises:
        OutputError: another process holds it, or see `open_own`.
    """
    while True:
        fd = open_own(path)
        try:
            if not lock(fd, path):
                os.unlink(path)
                fresh = open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                os.close(fd)
                return fresh
            if is_named(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise OutputError(
                f"{target}: another process is writing it", "wait for it, or choose another --out"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its holder removed it meanwhile


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only once its folder is. Warn if the
    file system cannot do that.

    Raises:
        OSError: the disk failed.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        _note(
            fd,
            folder,
            "cannot sync folders",
            error,
            "a power cut may undo the last changes of names there",
        )
    finally:
        os.close(fd)


def sync_finished(folder: Path) -> bool:
    """Sync the folder of an output that has its final name, and return whether the name is now
    durable.

    A failure is a warning, not an error: the output is complete, and must stay.
    """
    try:
        sync_folder(folder)
    except OSError as error:
        _log.warning(
            "note: %s cannot be synced (%s): after a power cut, look at what is there",
            _shown(folder),
            error.strerror,
        )
        return False
    return True


def rename(source: Path, target: Path) -> None:
    """Rename as `os.rename`, and ignore an error if the rename was done, as NFS reports for a
    repeated request."""
    before = os.lstat(source)
    try:
        os.rename(source, target)
    except OSError:
        if (
            os.path.lexists(source)
            or not os.path.lexists(target)
            or not os.path.samestat(before, os.lstat(target))
        ):
            raise


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` by a temporary file beside it, fsync, rename, fsync of the folder. A
    link at `path` is replaced.

    Raises:
        OSError: it cannot be written; `path` is as before.
    """
    # processes of several hosts may write to one folder: their numbers are not enough
    temporary = path.with_name(f".{path.name}.{random.SystemRandom().randrange(10**15)}.tmp")
    with os.fdopen(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    sync_folder(path.parent)


def write(
    path: Path,
    data: bytes,
    hint: str = "make room or grant access, then run again: finished points are kept",
) -> None:
    """Write `data` to `path`, completely or not at all.

    Args:
        hint: hint of the error.

    Raises:
        OutputError: the file cannot be written; `path` is as before.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", hint) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, created if need be, against other processes that do so. Waits for
    them.

    Raises:
        OutputError: `path` cannot be written, or is not a file of a sweep.
    """
    try:
        handle = hold(open_own(path))
        try:
            lock(handle, path, wait=True)
        except BaseException:
            release(handle)
            raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be locked: {error.strerror}", "put --out on a disk that has file locks"
        ) from error
    try:
        yield
    finally:
        release(handle)


_held: set[int] = set()


def hold(handle: int) -> int:
    """Return `handle`, to be closed from now on in every forked child: a lock lasts until the last
    process with its handle closes it."""
    _held.add(handle)
    return handle


def release(handle: int) -> None:
    """Close a handle that is held. Do nothing in a forked child, which does not have it."""
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


def _release_all() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_all)


def remove_temporaries(folder: Path) -> None:
    """Remove the files that killed writers left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name) and (
            leftover.is_symlink() or not leftover.is_dir()
        ):
            leftover.unlink(missing_ok=True)


def _kind(path: Path) -> str:
    """Return the kind of thing at `path`, in words."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return "nothing"
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device or socket")


def _note(fd: int, path: Path, what: str, error: OSError, so: str) -> None:
    key = (what, os.fstat(fd).st_dev)
    if key not in _noted:
        _noted.add(key)
        _log.warning(
            "note: the file system of %s %s (%s): %s",
            _shown(path),
            what,
            error.strerror or error,
            so,
        )


def _shown(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))[1:-1]

"""Files of this tool's own: never opened through a link, locked, synced, and whole or absent.

Names of working files can be guessed (`.OUT.pa_fast.partial`, `RUN/journal.jsonl`): whoever may
write to the folder can put a link there first, and what is written would land elsewhere. Every such
file is opened by `open_own`, and every such folder checked by `check_own_folder`. Both refuse a
link and whatever else is no plain file or folder.

Some file systems (NFS without a lock daemon, Lustre without `-o flock`, some of FUSE) have no
locks, or cannot sync a folder. Both are said once per file system, in a warning of the logger
`pa_fast`, and gone without.
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
    """`given` as a path; `what` calls it in errors.

    Raises:
        UsageError: it is no text and no path, empty, or no name that a file can have.
    """
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(
            f"{what}: found {one_line(repr(given), 60)}, expected a path",
            "give it as a text or a pathlib.Path",
        )
    return Path(text)


def check_outside(output: str | os.PathLike[str], sources: Iterable[object]) -> None:
    """Refuse an output that is the folder of a source or lies in it.

    Args:
        sources: checkpoints as they were given; what is no folder here, such as a hub id, is passed
            over.

    Raises:
        OutputError: naming output and source.
    """
    place = Path(os.path.realpath(Path(output).expanduser()))
    for source in sources:
        if not isinstance(source, (str, os.PathLike)):
            continue
        folder = os.path.expanduser(source)
        if os.path.isdir(folder) and Path(os.path.realpath(folder)) in (place, *place.parents):
            raise OutputError(
                f"{output}: is or lies in the source {source}, which is only read",
                "choose a place outside of it",
            )


def open_own(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a working file and return its descriptor. The caller truncates: nothing is cut off
    before the checks here.

    Raises:
        OutputError: a link, a pipe or anything else that is no plain file is there, or, where
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
    found = os.fstat(fd)
    what = ""
    if not stat.S_ISREG(found.st_mode):
        what = f"found {_kind(path)}, expected a file that pa_fast made, or nothing"
    elif found.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
        what = (
            f"the file has {found.st_nlink} names (hard links), and writing would change it under"
            " all of them"
        )
    if what:
        os.close(fd)
        raise OutputError(f"{path}: {what}", _PLANTED)
    return fd


def read_own(path: Path) -> bytes:
    """Read the whole working file `path`.

    Raises:
        OutputError: a link, a pipe or anything else that is no plain file is there.
        OSError: it cannot be read.
    """
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


def check_own_folder(path: Path) -> bool:
    """Return whether the working folder `path` exists.

    Raises:
        OutputError: a link or anything else that is no folder has its name.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        raise OutputError(
            f"{path}: found {_kind(path)}, expected a folder that pa_fast made, or nothing",
            _PLANTED,
        )
    return True


def is_named(fd: int, path: Path) -> bool:
    """Return whether `path` is still a name of the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


def lock(fd: int, path: Path, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock the open file `fd`, called `path`, until it is closed; False, with a note, where the
    file system has no locks.

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

    Where the file system has no locks, the file is made anew: whoever held it before finds, with
    `is_named`, that the name is another's now.

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
    """Make the names in `folder` durable: a rename is on disk only when its folder is. A note where
    that cannot be done.

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
    """Sync the folder of an output that has its final name, and return whether that is durable now.

    Whatever fails is a note, not an error: the output is complete, and nothing of it may be taken
    back.
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
    """`os.rename`, that is believed where it was done though an error came back, as NFS sends for a
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
    """Put `data` at `path`: a temporary file beside it, fsync, rename, fsync of the folder. A link
    at `path` is replaced.

    Raises:
        OSError: it cannot be written; what stood at `path` is as it was.
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
    """Put `data` at `path`, whole or not at all.

    Args:
        hint: what to do where that fails.

    Raises:
        OutputError: the file cannot be written; what stood at `path` is as it was.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", hint) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, made if need be, against other processes that do; waits for them.

    Raises:
        OutputError: `path` cannot be written, or is no file of a sweep's own.
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
    """`handle`, from now on closed in every forked child: a lock lasts until the last process with
    its handle closes it."""
    _held.add(handle)
    return handle


def release(handle: int) -> None:
    """Close a handle that is held; nothing in a forked child, which does not have it."""
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


def _release_all() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_all)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name) and (
            leftover.is_symlink() or not leftover.is_dir()
        ):
            leftover.unlink(missing_ok=True)


def _kind(path: Path) -> str:
    """The kind of thing at `path`, in words."""
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

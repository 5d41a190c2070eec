"""Files that are either whole or absent, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

from pa_fast.errors import OutputError


def write(
    path: pathlib.Path, data: bytes, hint: str = "make room or grant access, then run again: finished points are kept"
) -> None:
    """Put `data` at `path`: a temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        hint: what to do where that fails.

    Raises:
        OutputError: the file cannot be written; what stood at `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error.strerror}", hint) from error
        raise


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock file `path`, made if need be, against other processes that do; waits for them.

    Raises:
        OutputError: the file system has no locks, or `path` cannot be written.
    """
    try:
        handle = hold(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException:
            release(handle)
            raise
    except OSError as error:
        raise OutputError(f"{path} cannot be locked: {error.strerror}", "put --out on a disk that has file locks") from error
    try:
        yield
    finally:
        release(handle)


_held: set[int] = set()


def hold(handle: int) -> int:
    """`handle`, from now on closed in every forked child: a lock lasts until the last process with its handle closes it."""
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


def remove_temporaries(folder: pathlib.Path) -> None:
    """Remove what killed writers left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)

"""Files of a run folder that are either whole or absent, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from pa_fast import files
from pa_fast.errors import OutputError
from pa_fast.files import sync_folder

__all__ = ["hold", "locked", "release", "remove_temporaries", "sync_folder", "write"]


def write(
    path: pathlib.Path,
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
        files.write_whole(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", hint) from error


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock file `path`, made if need be, against other processes that do; waits for them.

    Raises:
        OutputError: `path` cannot be written, or is no file of a sweep's own.
    """
    try:
        handle = hold(files.open_own(path))
        try:
            files.lock(handle, path, wait=True)
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


def remove_temporaries(folder: pathlib.Path) -> None:
    """Remove what killed writers left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name) and (
            leftover.is_symlink() or not leftover.is_dir()
        ):
            leftover.unlink(missing_ok=True)

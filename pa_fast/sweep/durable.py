"""Files that are either whole or absent, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import os
import pathlib

from pa_fast.errors import OutputError


def write(path: pathlib.Path, data: bytes) -> None:
    """Put `data` at `path`: a temporary file beside it, fsync, rename, fsync of the folder.

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
            raise OutputError(
                f"{path} cannot be written: {error.strerror}",
                "make room or grant access, then run again: finished points are kept",
            ) from error
        raise


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: pathlib.Path) -> None:
    """Remove what killed writers left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)

"""A JSON document that nobody has vouched for: read whole, or refused by name."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
from pathlib import Path
from typing import Any

from pa_fast.errors import CheckpointError
from pa_fast.foreign import is_deep, one_line
from pa_fast.units import format_bytes

LIMIT_BYTES = 100_000_000  # what safetensors allows for a header; no config or index comes near it

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git-lfs is to replace by what it stands for."""


def refuse_pointer(path: Path, data: bytes) -> None:
    """Raise CheckpointError if `data`, the beginning of the file `path`, is a git-lfs pointer.

    Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if data.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d{1,18})$", data[:1024], re.MULTILINE)
        stands = f" for a file of {format_bytes(int(size[1]))}" if size else ""
        raise CheckpointError(
            f"{path}: found a git-lfs pointer{stands}, not the file itself: the folder was cloned"
            " without git-lfs",
            f"install git-lfs, then: git -C {shlex.quote(str(path.parent))} lfs pull",
        )


def quoted(text: str) -> str:
    """`text` in backticks, printable and at most 120 characters, so that a hostile name cannot
    flood or colour a terminal."""
    return f"`{one_line(text, 120)}`"


def regular_size(path: Path) -> int:
    """Bytes in the regular file `path` (links are followed: a hub cache is made of them).

    Raises:
        CheckpointError: missing, a broken link, or not a regular file (a pipe would block for
            ever).
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}", "complete the download or check the path"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a regular file", "replace it by the file itself")
    return found.st_size


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, as UTF-8 and without duplicate keys at any depth.

    Args:
        where: file (and place in it) for messages.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deep, a key twice, or not an object.
    """
    hint = "download the file again"
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}", hint) from None
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep to be a checkpoint's", hint) from None
    except _Duplicate as error:
        raise CheckpointError(
            f"{where}: the name {quoted(error.args[0])} appears twice in one JSON object", hint
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}", hint) from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where}: found JSON {type(found).__name__}, expected an object", hint
        )
    if is_deep(found):  # whoever walks or prints it recurses, and the parser goes deeper
        raise CheckpointError(f"{where}: JSON nested too deep to be a checkpoint's", hint)
    return found


def read_object(path: Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        CheckpointError: missing, larger than `limit_bytes`, or not a plain JSON object.
    """
    size = regular_size(path)
    if size > limit_bytes:
        raise CheckpointError(
            f"{path}: {size} bytes, expected at most {limit_bytes}",
            "this is not a checkpoint's JSON file",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", "check its permissions"
        ) from None
    refuse_pointer(path, data)
    return parse_object(data, str(path))


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Duplicate(name)
        found[name] = value
    return found

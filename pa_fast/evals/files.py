"""Data files: read once, whole, with the digest that ties a run to them."""

from __future__ import annotations

import hashlib
import pathlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pa_fast.errors import EvaluatorError
from pa_fast.files import path_of

T = TypeVar("T")


@dataclass(frozen=True)
class DataFile:
    """A data file as text, with the SHA-256 of its bytes."""

    path: pathlib.Path
    text: str
    sha256: str


def read_file(path: str | pathlib.Path) -> DataFile:
    """Read a UTF-8 file; a byte-order mark is dropped.

    Raises:
        UsageError: `path` is none.
        EvaluatorError: it cannot be read, or is not UTF-8.
    """
    path = path_of(path, "data file")
    try:
        raw = path.read_bytes()
        return DataFile(path, raw.decode("utf-8-sig"), hashlib.sha256(raw).hexdigest())
    except OSError as error:
        raise EvaluatorError(
            f"{path} cannot be read: {error.strerror or error}", "check the path of the data file"
        ) from None
    except ValueError as error:
        raise EvaluatorError(
            f"{path} is not UTF-8: {error}", "save the data file as UTF-8"
        ) from None


def limited(rows: Sequence[T], groups: Sequence[str], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of N `rows` in all, drawn with `seed`, in their own order: from each of the
    `groups` that the rows belong to as many as from any other, as far as it has them. This is what
    a limit means to every evaluator.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    kept: list[int] = []
    for place, indices in enumerate(sorted(members.values(), key=len)):
        # what a small group lacks the larger ones give
        share = min(len(indices), (limit - len(kept)) // (len(members) - place))
        kept += random.Random(f"{seed}:limit").sample(indices, share)
    return [rows[index] for index in sorted(kept)]

"""Checks of `LiveWeights.open`: that a delta file, a base and live tensors belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pa_kernels
from pa_kernels.reference import LIVE_DTYPES

from pa_fast.checkpoint.provenance import as_hex, combine
from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.errors import CheckpointError, DataError, PairError
from pa_fast.live.binding import Binding
from pa_fast.stores import registry
from pa_fast.stores.file import DeltaFile, Description
from pa_fast.stores.store import Entry

_ANOTHER = "encode the delta again, from this base and for this model"


def description_of(path: str | Path) -> Description:
    """Return the description in the delta file `path`; see `DeltaFile.open`."""
    with DeltaFile.open(path) as file:
        return file.description


def reopened(path: str | Path, known: Description | None) -> DeltaFile:
    """Open the delta file `path` again, whose description was `known` before.

    Raises:
        DataError: it has another description now.
    """
    file = DeltaFile.open(path)
    if file.description != known:
        file.close()
        raise DataError(
            f"{path}: the file was replaced while it was read",
            "let whatever writes it finish, then run again",
        )
    return file


def own_name(binding: Binding, file: DeltaFile) -> str:
    """Return the one of a live tensor's names that the file has.

    Raises:
        PairError: the file has none of them, or several.
    """
    known = [name for name in binding.names if name in file.description.tensors]
    if not known:
        raise PairError(
            f"cannot bind `{binding.name}`: it is live, but {file.path} has no delta of it",
            _ANOTHER,
        )
    if len(known) > 1:
        raise PairError(
            f"`{known[0]}` and `{known[1]}` share live storage, but {file.path} has a delta of"
            " each",
            "untie the live tensors before opening the delta",
        )
    return known[0]


def described(binding: Binding, file: DeltaFile) -> Binding:
    """Check `binding` against the file, and return it with the file's `intermediate_dtype`.

    Raises:
        PairError: shape or dtype of the live tensor or of the base are not those that the delta was
            encoded for.
    """
    if binding.live.dtype not in LIVE_DTYPES:
        return binding
    name = own_name(binding, file)
    recorded = file.description.tensors[name]
    for what, actual, expected in (
        ("live", list(binding.live.shape), list(recorded.shape)),
        ("live", binding.live.dtype, torch_dtype(recorded.live)),
        ("base", binding.base.dtype, torch_dtype(recorded.base)),
    ):
        if actual != expected:
            raise PairError(
                f"cannot bind `{name}`: {what} is {actual}, the delta {file.path} is for"
                f" {expected}",
                _ANOTHER,
            )
    between = recorded.intermediate_dtype
    return replace(binding, intermediate_dtype=None if between is None else torch_dtype(between))


def check_delta_names(bound: Sequence[Binding], file: DeltaFile) -> None:
    """Raise PairError if the file has a delta of a tensor that is not live."""
    floats = {
        name for binding in bound if binding.live.dtype in LIVE_DTYPES for name in binding.names
    }
    odd = [name for name in file.description.tensors if name not in floats]
    if odd:
        raise PairError(
            f"cannot bind `{odd[0]}`: {file.path} has a delta of it, but there is no live tensor of"
            " that name",
            _ANOTHER,
        )


def check_base(floats: Sequence[Binding], file: DeltaFile) -> None:
    """Raise PairError unless these are, bit for bit, the base tensors that the delta was encoded
    from."""
    sums = pa_kernels.checksum(
        [binding.base for binding in floats], file.description.checksum_version
    )
    content = as_hex(
        combine({own_name(binding, file): total for binding, total in zip(floats, sums)})
    )
    if content != file.description.base.content:
        raise PairError(
            f"{file.path}: encoded from a base of content {file.description.base.content}, this"
            f" base has {content}",
            "a delta is for the one base that it was taken from",
        )


def check_entries(floats: Sequence[Binding], entries: Sequence[Entry], file: DeltaFile) -> None:
    """Raise CheckpointError unless each entry fits its base, where λ = 0 and 1 alone do not show
    that."""
    for binding, entry in zip(floats, entries):
        misfit = registry.owner(entry).misfit(entry, binding.base)
        if misfit is not None:
            raise CheckpointError(
                f"{file.path}: `{own_name(binding, file)}`: {misfit}",
                "the file is damaged, or an earlier version wrote it: encode the delta again",
            )


def check_endpoint(floats: Sequence[Binding], file: DeltaFile, lam: float) -> None:
    """Raise CheckpointError, naming the tensor, unless the live tensors at λ = 0 or 1 are what they
    were at encoding."""
    sums = pa_kernels.checksum(
        [binding.live for binding in floats], file.description.checksum_version
    )
    for binding, total in zip(floats, sums):
        name = own_name(binding, file)
        expected = file.description.tensors[name].endpoint_sums[int(lam)]
        if expected is not None and as_hex(total) != expected:
            raise CheckpointError(
                f"{file.path}: `{name}` at λ = {lam:g} has checksum {as_hex(total)}, expected"
                f" {expected} as it was encoded",
                "the file is damaged, or something writes to its base: encode it again",
            )

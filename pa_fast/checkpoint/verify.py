"""`pa-fast verify`: is this checkpoint that merge? Bit by bit, against its sources."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pa_fast.base import Lambda
from pa_fast.checkpoint.card import PROVENANCE, Provenance, read_provenance
from pa_fast.checkpoint.header import FLOATS
from pa_fast.checkpoint.pairing import Pair, pair
from pa_fast.checkpoint.reader import Checkpoint, torch_dtype
from pa_fast.checkpoint.source import resolve
from pa_fast.checkpoint.streaming import check_dtype, live_dtype, merge_chunk_, over_chunks
from pa_fast.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the merge: `reason`, and how many of its `count` elements differ where they can be compared."""

    name: str
    reason: str
    differing: int
    count: int


@dataclass(frozen=True)
class VerifyReport:
    """`ok` if every tensor of `merged` has the bits of the merge and there is no tensor more or less."""

    ok: bool
    merged: str
    lam: str
    tensors: int
    differences: tuple[TensorDifference, ...]
    notes: tuple[str, ...]


def verify(
    merged: str | Path,
    base: str | Path,
    instruct: str | Path,
    lam: Lambda | float | str | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare the checkpoint `merged` with W(λ) of a pair, bit by bit, without writing anything.

    Args:
        lam: λ; that of pa_fast.json in `merged` where not given. So is the dtype; a folder without that file is
            compared in its own dtypes.
        progress: called with (bytes compared, bytes in all).

    Cost: one pass over the three checkpoints; memory of a few chunks (2^20 elements each).

    Raises:
        UsageError: no λ given, and no pa_fast.json says it.
        CheckpointError, PairError, DataError: a folder cannot be read, or the pair is none.
    """
    from pa_kernels.cores import cores

    with (
        Checkpoint.open(resolve(merged)) as found,
        Checkpoint.open(resolve(base)) as left,
        Checkpoint.open(resolve(instruct)) as right,
        cores() as pool,
    ):
        provenance = read_provenance(found.folder)
        if lam is None and provenance is None:
            raise UsageError(f"{merged}: no {PROVENANCE} says which λ it was merged with", "give it: --lambda 0.6")
        exact = Lambda(lam if lam is not None else provenance.lam)  # type: ignore[union-attr]
        dtype = provenance.dtype if provenance else None
        if dtype is not None:
            check_dtype(dtype)
        sources = pair(left, right)
        differences = []
        done, total = 0, sum(info.nbytes for info in found.tensors.values())
        for name in [*sources.names, *(name for name in found.tensors if name not in sources.shapes)]:
            difference = _tensor(pool, found, sources, name, float(exact), dtype)
            if difference:
                differences.append(difference)
            done += found.tensors[name].nbytes if name in found.tensors else 0
            if progress:
                progress(done, total)
        notes = _notes(provenance, sources, exact) + sources.notes
    return VerifyReport(not differences, str(merged), exact.key, len(sources.names), tuple(differences), notes)


def _tensor(
    pool: ThreadPoolExecutor, found: Checkpoint, sources: Pair, name: str, lam: float, dtype: str | None
) -> TensorDifference | None:
    if name not in sources.shapes:
        return TensorDifference(name, "not in the pair", 0, found.tensors[name].count)
    if name not in found.tensors:
        return TensorDifference(name, "missing", 0, sources.count(name))
    own, expected = found.tensors[name], sources.shapes[name]
    if own.shape != expected:
        return TensorDifference(name, f"shape {list(own.shape)}, expected {list(expected)}", 0, own.count)
    free = dtype is None and own.dtype in FLOATS and sources.is_lerped(name)
    want = own.dtype if free else live_dtype(sources, name, dtype or "auto")
    if own.dtype != want:
        return TensorDifference(name, f"dtype {own.dtype}, expected {want}", 0, own.count)
    differing = _differing(pool, found, sources, name, lam)
    return TensorDifference(name, "bits differ", differing, own.count) if differing else None


def _differing(pool: ThreadPoolExecutor, found: Checkpoint, sources: Pair, name: str, lam: float) -> int:
    """Elements of tensor `name` whose bits are not those of the merge."""
    import torch

    dtype = torch_dtype(found.tensors[name].dtype)

    def one(start: int, stop: int, base: torch.Tensor, instruct: torch.Tensor) -> int:
        expected = torch.empty(stop - start, dtype=dtype)
        merge_chunk_(expected, base, instruct, lam)
        left, right = _bits(found.chunk(name, start, stop)), _bits(expected)
        return 0 if torch.equal(left, right) else int((left != right).any(dim=1).sum())

    count = sum(over_chunks(pool, sources, name, one))
    found.check_unchanged(name)
    return count


def _bits(chunk: torch.Tensor) -> torch.Tensor:
    """The bytes of a chunk [n, itemsize]: comparing values would take a NaN for different and -0 for equal."""
    import torch

    return chunk.view(torch.uint8).view(-1, chunk.element_size())


def _notes(provenance: Provenance | None, sources: Pair, lam: Lambda) -> tuple[str, ...]:
    if provenance is None:
        return (f"no {PROVENANCE}: compared in the dtypes that the checkpoint has",)
    notes = []
    if provenance.lam != lam.key:
        notes.append(f"{PROVENANCE} says λ = {provenance.lam}, compared with λ = {lam.key}")
    for side, recorded, checkpoint in (
        ("base", provenance.base, sources.base),
        ("instruct", provenance.instruct, sources.instruct),
    ):
        found = checkpoint.quick_fingerprint()
        if found != recorded.quick_fingerprint:
            notes.append(
                f"{side} is not the checkpoint that was merged: fingerprint {found}, recorded {recorded.quick_fingerprint}"
            )
    return tuple(notes)

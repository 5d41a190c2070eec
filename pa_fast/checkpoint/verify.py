"""Verification of a merged checkpoint, bit by bit, against its sources: `pa-fast verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pa_fast.base import Lambda
from pa_fast.checkpoint.folder import PROVENANCE, resolve
from pa_fast.checkpoint.pair import Pair, PairOptions, pair
from pa_fast.checkpoint.provenance import Provenance, read_provenance
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import FLOATS, torch_dtype
from pa_fast.checkpoint.streaming import (
    MergeSpec,
    TensorMerge,
    dtype_name,
    live_dtype,
    merge_chunk_,
    over_chunks,
)
from pa_fast.errors import UsageError
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the merge: `reason`, and the number `differing` of its `count`
    elements, if they can be compared."""

    name: str
    reason: str
    differing: int
    count: int


@dataclass(frozen=True)
class VerifyReport:
    """Result of a verification. `ok` if `merged` has the tensors of the merge, no more and no less,
    with the same bits; `lam`, `rounding` and `rule`, a text for each of its rows, are those of the
    merge that it was compared with."""

    ok: bool
    merged: str
    lam: str
    tensors: int
    differences: tuple[TensorDifference, ...]
    notes: tuple[str, ...]
    rounding: str = "nearest"
    rule: tuple[str, ...] = ()

    @property
    def merge(self) -> str:
        """The merge that `merged` was compared with, in words."""
        rounding = "" if self.rounding == "nearest" else f", rounding {self.rounding}"
        rule = f", under the rule ({'; '.join(self.rule)})" if self.rule else ""
        return f"the merge at λ = {self.lam}{rounding}{rule}"


def verify(
    merged: str | Path,
    base: str | Path,
    instruct: str | Path,
    lam: Lambda | float | str | None = None,
    *,
    rounding: str | Rounding | None = None,
    seed: int | None = None,
    rule: RuleLike | None = None,
    options: PairOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare the checkpoint `merged` with W(λ) of a pair, bit by bit, without writing anything.

    Args:
        lam, rounding, seed, rule: as for `merge`; by default those in pa_fast.json of `merged`,
            which also gives the dtype. A folder without that file is compared in its own dtypes.
        options: pairing options; by default those in pa_fast.json.
        progress: called with (bytes compared, bytes in all).

    Example:
        report = pa_fast.verify("merged", "base", "instruct")
        report.ok, report.differences
        pa_fast.verify("merged", "base", "instruct", 0.6).ok

    Cost: one pass over the three checkpoints; memory of a few chunks (2^20 elements each).

    Raises:
        UsageError: λ is neither given nor in pa_fast.json, or an argument is not valid.
        CheckpointError, PairError, DataError: a folder cannot be read, or the two do not pair.
    """
    from pa_kernels.cores import cores

    with (
        Checkpoint.open(resolve(merged)) as checkpoint,
        Checkpoint.open(resolve(base)) as b,
        Checkpoint.open(resolve(instruct)) as i,
        cores() as pool,
    ):
        provenance = read_provenance(checkpoint.folder)
        if lam is None and provenance is None:
            raise UsageError(
                f"{merged}: no {PROVENANCE} says which λ it was merged with",
                "give it: --lambda 0.6",
            )
        spec = _spec(provenance.spec if provenance else None, lam, rounding, seed, rule)
        dtype = provenance.dtype if provenance else None
        if dtype is not None:
            dtype = dtype_name(dtype)
        sources = pair(b, i, options or (provenance.options if provenance else PairOptions()))
        merges = spec.tensor_merges(sources)
        names = [
            *sources.names,
            *(name for name in checkpoint.tensors if name not in sources.shapes),
        ]
        wrong = {
            name: difference
            for name in names
            if (difference := _header_difference(checkpoint, sources, name, dtype))
        }
        compared = [name for name in names if name not in wrong]
        done, total = 0, sum(checkpoint.tensors[name].nbytes for name in compared)
        counts = dict.fromkeys(compared, 0)
        for name, (size, differing) in _compared(pool, checkpoint, sources, compared, merges):
            counts[name] += differing
            done += size
            if progress:
                progress(done, total)
        for name, differing in counts.items():
            if differing:
                wrong[name] = TensorDifference(
                    name, "bits differ", differing, checkpoint.tensors[name].count
                )
        differences = [wrong[name] for name in names if name in wrong]
        notes = _notes(provenance, sources, spec) + sources.notes
    return VerifyReport(
        not differences,
        str(merged),
        spec.lam.key,
        len(sources.names),
        tuple(differences),
        notes,
        str(spec.rounding),
        () if spec.rule is None else tuple(map(str, spec.rule.rows)),
    )


def _spec(
    recorded: MergeSpec | None,
    lam: Lambda | float | str | None,
    rounding: str | Rounding | None,
    seed: int | None,
    rule: RuleLike | None,
) -> MergeSpec:
    """Return the requested merge, completed by the one that the merged folder records."""
    known = recorded or MergeSpec(Lambda(0), Rounding())
    wanted = Lambda(known.lam if lam is None else lam)
    mode = known.rounding.mode if rounding is None else rounding
    noise = known.rounding.seed if seed is None and mode == known.rounding.mode else seed
    return MergeSpec.of(wanted, mode, noise, known.rule if rule is None else rule)


def _header_difference(
    checkpoint: Checkpoint, sources: Pair, name: str, dtype: str | None
) -> TensorDifference | None:
    """Return the difference of tensor `name` that shows before its bits are read; None if there is
    none."""
    if name not in sources.shapes:
        return TensorDifference(name, "not in the pair", 0, checkpoint.tensors[name].count)
    if name not in checkpoint.tensors:
        return TensorDifference(name, "missing", 0, sources.count(name))
    own, expected = checkpoint.tensors[name], sources.shapes[name]
    if own.shape != expected:
        return TensorDifference(
            name, f"shape {list(own.shape)}, expected {list(expected)}", 0, own.count
        )
    free = dtype is None and own.dtype in FLOATS and sources.is_lerped(name)
    want = own.dtype if free else live_dtype(sources, name, dtype or "auto")
    if own.dtype != want:
        return TensorDifference(name, f"dtype {own.dtype}, expected {want}", 0, own.count)
    return None


def _compared(
    pool: ThreadPoolExecutor,
    checkpoint: Checkpoint,
    sources: Pair,
    names: list[str],
    merges: Mapping[str, TensorMerge],
) -> Iterator[tuple[str, tuple[int, int]]]:
    """For every chunk of the tensors `names`, yield its bytes and the number of its elements that
    differ from the merge."""
    import torch
    from pa_kernels.cores import Scratch

    scratch = Scratch()

    def one(
        name: str, start: int, stop: int, base: torch.Tensor, instruct: torch.Tensor
    ) -> tuple[int, int]:
        dtype = torch_dtype(checkpoint.tensors[name].dtype)
        expected, own = (scratch.take(use, stop - start, dtype) for use in ("expected", "found"))
        merge_chunk_(expected, base, instruct, merges.get(name), start)
        own = checkpoint.chunk(name, start, stop, own)
        if torch.equal(_bits(own), _bits(expected)):
            return own.nbytes, 0
        differs = (_bits(own) != _bits(expected)).any(dim=1)
        if dtype.is_floating_point:  # the contract leaves the payload of a NaN open
            differs &= ~(own.float().isnan() & expected.float().isnan())
        return own.nbytes, int(differs.sum())

    return over_chunks(pool, sources, names, one)


def _bits(chunk: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a chunk [n, itemsize]. Comparing values would take a NaN for different
    and -0 for equal."""
    import torch

    return chunk.view(torch.uint8).view(-1, chunk.element_size())


def _notes(provenance: Provenance | None, sources: Pair, spec: MergeSpec) -> tuple[str, ...]:
    if provenance is None:
        return (f"no {PROVENANCE}: compared in the dtypes that the checkpoint has",)
    notes = []
    if provenance.store is not None:
        notes.append(
            f"{PROVENANCE} says that it was saved from live weights whose delta was held as"
            f" {provenance.store}, which loses some of it: not the bits of the merge"
        )
    for what, recorded, used in (
        ("λ =", provenance.spec.lam.key, spec.lam.key),
        ("rounding", provenance.spec.rounding, spec.rounding),
        ("the rule", _spelled(provenance.spec.rule), _spelled(spec.rule)),
    ):
        if recorded != used:
            notes.append(f"{PROVENANCE} says {what} {recorded}, compared with {what} {used}")
    crossed = sources.instruct.quick_fingerprint(), sources.base.quick_fingerprint()
    if (
        crossed == (provenance.base.quick_fingerprint, provenance.instruct.quick_fingerprint)
        and len(set(crossed)) == 2
    ):
        return (
            *notes,
            (
                f"base and instruct are swapped: {PROVENANCE} has the fingerprint of each under the"
                " other's name"
            ),
        )
    for side, source, checkpoint in (
        ("base", provenance.base, sources.base),
        ("instruct", provenance.instruct, sources.instruct),
    ):
        fingerprint = checkpoint.quick_fingerprint()
        if fingerprint != source.quick_fingerprint:
            notes.append(
                f"{side} is not the checkpoint that was merged: fingerprint {fingerprint}, recorded"
                f" {source.quick_fingerprint}"
            )
    return tuple(notes)


def _spelled(rule: LambdaRule | None) -> str:
    return "none" if rule is None else "; ".join(map(str, rule.rows))

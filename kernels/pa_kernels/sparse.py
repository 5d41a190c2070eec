"""The sparse set: live tensors rewritten in place at listed positions for any λ, with the bits of
`reference.lerp` there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from pa_kernels.cores import inference, over_cores
from pa_kernels.lerp import lerp_piece_
from pa_kernels.reference import BITS, INDEX_TILE, LIVE_DTYPES
from pa_kernels.sparse_tensor import SparseTensor
from pa_kernels.switch import Group, Switch, refuse_flushed_denormals
from pa_kernels.tiles import INTERPRETED

PIECE = 1 << 17
"""Positions per unit of work on the CPU: a piece of half as many costs 4–7 % more each, larger ones
gain nothing."""

AHEAD = 1 << 13
"""Positions whose cache lines are loaded before any of them is stored to: they are still in a
core's L2 then."""

LINE_BYTES = 64


class Sparse(Switch):
    """T live tensors, each with a delta that lives at positions only, prepared once so that any λ
    costs one pass over these.

    Args:
        out: live tensors, rewritten in place at the positions; contiguous bf16, fp16 or fp32.
            Elsewhere they must hold what base and target share, rounded to their dtype: those
            elements are neither read nor written.
        entries: a `SparseTensor` for each, where the live tensor is, with as many elements. Checked
            here: whatever a file held, no write leaves its tensor. They must not change afterwards.
        via: for each tensor the dtype that its result is rounded to before its own, or None.

    Attributes:
        groups: one per (out, base, target, via) dtype tuple, kind and GPU, and one for all CPU
            tensors.

    Numerics:
        Bit for bit `reference.lerp` at the positions, whatever λ came before; λ = 0 restores the
        base's bits, and λ = 1 gives the target's, where they have the live dtype.

    Cost:
        Preparing reads the positions once. A switch reads the entries, 6 bytes each for bf16 and an
        index list, and touches a sector of the live tensor for nearly every one of them. On the CPU
        bitmaps are unpacked into index lists first, which takes 2 bytes more per position, because
        unpacking at every switch would cost more than a dense pass.

    Raises:
        ValueError, TypeError: naming entry t and what was found and expected.
    """

    def __init__(
        self,
        out: Sequence[Tensor],
        entries: Sequence[SparseTensor],
        via: Sequence[torch.dtype | None] | None = None,
    ):
        self.count = len(out)
        rows = _checked(out, entries, via)
        on_cpu = [
            t for t, row in enumerate(rows) if row.out.device.type == "cpu" and not INTERPRETED
        ]
        self.groups: tuple[Group, ...] = (
            (_CpuGroup(on_cpu, [rows[t] for t in on_cpu]),) if on_cpu else ()
        )
        self.groups += tuple(_triton_groups(rows, sorted(set(range(self.count)) - set(on_cpu))))


def sparse_set_(
    out: Sequence[Tensor],
    entries: Sequence[SparseTensor],
    lam: float | Sequence[float],
    *,
    via: Sequence[torch.dtype | None] | None = None,
) -> None:
    """Write W(λ) into `out` at the entries' positions, once; see `Sparse` for the arguments, and
    for many λ."""
    Sparse(out, entries, via).run_(lam)


@dataclass(frozen=True)
class Row:
    """One entry: live tensor (flat and detached), what to set there, and the dtype to round to
    first."""

    out: Tensor
    sparse: SparseTensor
    via: torch.dtype | None


class _CpuGroup:
    """All CPU tensors of a `Sparse`, as index lists. `pieces` are (row, first tile, last tile,
    first entry, last entry)."""

    def __init__(self, entries: Sequence[int], rows: Sequence[Row]):
        self.entries = tuple(entries)
        self.rows = [replace(row, sparse=row.sparse.as_index()) for row in rows]
        self.lams = torch.zeros(len(rows), dtype=torch.float32, device="cpu")
        self.pieces = [
            (at, *piece) for at, row in enumerate(self.rows) for piece in _pieces(row.sparse)
        ]

    def launch_(self) -> None:
        refuse_flushed_denormals()
        lams = self.lams.tolist()

        def write(piece: tuple[int, int, int, int, int]) -> None:
            at, tile, last_tile, entry, last_entry = piece
            row, span = self.rows[at], slice(entry, last_entry)
            with inference():
                counts = row.sparse.starts[tile : last_tile + 1].diff()
                offsets = torch.arange(tile, last_tile, device="cpu") * INDEX_TILE
                positions = torch.repeat_interleave(offsets, counts, output_size=last_entry - entry)
                positions += row.sparse.where[span].long()
                values = torch.empty(last_entry - entry, dtype=row.out.dtype, device="cpu")
                lerp_piece_(
                    values, row.sparse.base[span], row.sparse.target[span], lams[at], row.via
                )
                elements = (last_tile - tile) * INDEX_TILE
                _scatter_(
                    row.out,
                    positions,
                    values,
                    positions.numel() * (LINE_BYTES // values.itemsize) < elements,
                )

        over_cores(write, self.pieces)


def _scatter_(live: Tensor, positions: Tensor, values: Tensor, alone: bool) -> None:
    """live[positions] = values; `alone` says that most positions have a cache line to
    themselves."""
    bits = BITS[live.dtype]
    for here, there in zip(positions.split(AHEAD), values.view(bits).split(AHEAD)):
        if alone:
            # stores wait for their lines one after another, loads for many at a time: so load what
            # is about to be stored
            torch.index_select(live.view(bits), 0, here)
        live.view(bits).index_copy_(0, here, there)


def _pieces(entry: SparseTensor) -> Iterator[tuple[int, int, int, int]]:
    """An index list cut between tiles, into runs of about PIECE entries."""
    if entry.count == 0:
        return
    cuts = (
        torch.searchsorted(
            entry.starts, torch.arange(0, entry.count, PIECE, device="cpu"), right=True
        )
        - 1
    )
    tiles = [*cuts.unique().tolist(), entry.starts.numel() - 1]
    for tile, last in pairwise(tiles):
        yield tile, last, int(entry.starts[tile]), int(entry.starts[last])


def _triton_groups(rows: Sequence[Row], entries: Sequence[int]) -> list[Group]:
    if not entries:
        return []
    from pa_kernels import sparse_triton

    kinds: dict[tuple[object, ...], list[int]] = {}
    for t in entries:
        row = rows[t]
        dtypes = (row.out.dtype, row.sparse.base.dtype, row.sparse.target.dtype, row.via)
        kinds.setdefault((row.out.device, row.sparse.kind, *dtypes), []).append(t)
    return [sparse_triton.Group(members, [rows[t] for t in members]) for members in kinds.values()]


def _checked(
    out: Sequence[Tensor], entries: Sequence[SparseTensor], via: Sequence[torch.dtype | None] | None
) -> list[Row]:
    vias = [None] * len(out) if via is None else list(via)
    if not len(out) == len(entries) == len(vias):
        raise ValueError(
            f"{len(out)} live tensors, {len(entries)} sparse, {len(vias)} via: expected as many of"
            " each"
        )
    rows: list[Row] = []
    for t, (w, entry, rounding) in enumerate(zip(out, entries, vias)):
        if not isinstance(w, Tensor) or w.dtype not in LIVE_DTYPES:
            found = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(
                f"entry {t}: live is {found}, expected a tensor of bfloat16, float16 or float32"
            )
        if not w.is_contiguous():
            raise ValueError(
                f"entry {t}: live has strides {w.stride()} for shape {tuple(w.shape)}, expected"
                " contiguous"
            )
        if w.device.type not in ("cpu", "cuda"):
            raise ValueError(f"entry {t}: on {w.device}, expected cpu or cuda")
        if rounding is not None and rounding not in LIVE_DTYPES:
            raise TypeError(
                f"entry {t}: via is {rounding}, expected bfloat16, float16, float32 or None"
            )
        if not isinstance(entry, SparseTensor):
            raise TypeError(f"entry {t}: sparse is {type(entry).__name__}, expected a SparseTensor")
        if entry.numel != w.numel():
            raise ValueError(
                f"entry {t}: sparse is of {entry.numel} elements, the live tensor has {w.numel()}"
            )
        if entry.base.device != w.device and not (
            w.device.type == "cuda" and entry.where.is_pinned()
        ):
            raise ValueError(
                f"entry {t}: sparse is on {entry.base.device}, the live tensor on {w.device}"
            )
        try:
            entry.check()
        except ValueError as error:
            raise ValueError(f"entry {t}: {error}") from None
        # rounding to fp32, or twice to the same dtype, changes nothing
        rounding = None if rounding in (torch.float32, w.dtype) else rounding
        rows.append(Row(w.detach().view(-1), entry, rounding))
    return rows

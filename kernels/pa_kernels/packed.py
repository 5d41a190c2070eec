"""The packed switch: live tensors rewritten in place from W(λ) to W(λ′) by codes alone, with the
bits of `reference.lerp`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pa_kernels.checksum import CHUNK_BYTES, checksum, piece_checksum
from pa_kernels.cores import inference, over_cores
from pa_kernels.packed_look_up import Kind, Way, switch_piece_
from pa_kernels.packed_pairs import sources, table
from pa_kernels.packed_tensor import PackedTensor
from pa_kernels.reference import MANTISSA
from pa_kernels.switch import Group, Switch, one_for_each, refuse_flushed_denormals
from pa_kernels.tiles import INTERPRETED

PIECE = 1 << 18
"""Elements per unit of work on the CPU: whole tiles and whole chunks of the checksum, and scratch
that stays in a core's L2."""


FEW = 1 << 17
"""Weights up to which a switch on the CPU makes no table of its steps: one takes as long as
switching so many without."""


class PackedGroup(Group, Protocol):
    """Entries that are switched together, and what they are known to hold.

    Attributes:
        olds: fp32 λ that each live tensor holds.
        sums: int64 checksums that they have with it.
        wrong: bool, entries that were found with another sum, since they were last taken for right.
    """

    tensors: Sequence[Tensor]
    olds: Tensor
    sums: Tensor
    wrong: Tensor


class Packed(Switch):
    """T live tensors whose deltas are codes, prepared once. What they hold is all that is known of
    base and target.

    Args:
        out: live tensors, rewritten in place; contiguous bf16 or fp16, on the CPU or a GPU.
        entries: a `PackedTensor` for each, of its dtype and number of elements; on a GPU codes and
            exceptions may also lie in pinned host memory. Checked here: whatever a file held, no
            write leaves its tensor.

    Numerics:
        Bit for bit `reference.lerp` of base and target, after any walk of λ within the range of the
        codes, provided that the live tensors were right when `holds` was called, and that nobody
        else writes to them. Every switch sums what it finds and what it leaves, so that a foreign
        write is noticed: see `wrong`. What it then leaves is of no use.

    Cost:
        A switch reads and writes the live tensors and reads the codes: 5 bytes per weight of 8-bit
        codes, 6 of 16-bit ones, both checksums included.

    Raises:
        ValueError, TypeError: naming entry t and what was found and expected.
    """

    groups: tuple[PackedGroup, ...]

    def __init__(self, out: Sequence[Tensor], entries: Sequence[PackedTensor]):
        self.count = len(out)
        rows = _checked(out, entries)
        self.ranges = [row.entry.range for row in rows]
        on_cpu = [
            t for t, row in enumerate(rows) if row.out.device.type == "cpu" and not INTERPRETED
        ]
        self.groups = (_CpuGroup(on_cpu, [rows[t] for t in on_cpu]),) if on_cpu else ()
        self.groups += tuple(_triton_groups(rows, sorted(set(range(self.count)) - set(on_cpu))))

    def holds(self, lam: float | Sequence[float]) -> None:
        """Take the live tensors, as they are, for W(λ): one λ for all, or one for each. Reads them
        once."""
        lams = self._within(lam)
        for group in self.groups:
            with inference():
                group.olds.copy_(
                    torch.tensor([lams[t] for t in group.entries], dtype=torch.float32)
                )
                signed = [(total + 2**63) % 2**64 - 2**63 for total in checksum(group.tensors)]
                group.sums.copy_(torch.tensor(signed, dtype=torch.int64))
                group.wrong.zero_()

    def run_(self, lam: float | Sequence[float]) -> None:
        """Rewrite every live tensor for λ, one for all or one for each.

        Raises:
            ValueError: a λ is outside the range of its codes, or there are not as many as tensors.
        """
        self._within(lam)
        super().run_(lam)

    def wrong(self) -> list[int]:
        """Entries whose live tensor did not hold what the last switch had left, or `holds` was
        told. Waits for the device."""
        return sorted(
            t
            for group in self.groups
            for t, found in zip(group.entries, group.wrong.tolist())
            if found
        )

    def sums(self) -> list[int]:
        """The checksum that each live tensor has, by what was written to it. Waits for the
        device."""
        found = {
            t: total
            for group in self.groups
            for t, total in zip(group.entries, group.sums.tolist())
        }
        return [found[t] % 2**64 for t in range(self.count)]

    def holding(self, t: int) -> float:
        """The fp32 λ that live tensor t holds, by what was written to it. Waits for the device."""
        group = next(group for group in self.groups if t in group.entries)
        return float(group.olds[group.entries.index(t)])

    def _within(self, lam: float | Sequence[float]) -> list[float]:
        lams = one_for_each(lam, self.count)[: self.count]
        for t, (one, (lo, hi)) in enumerate(zip(lams, self.ranges)):
            if not lo <= one <= hi:
                raise ValueError(
                    f"entry {t}: λ = {one:g} is outside [{lo:g}, {hi:g}], for which its codes are"
                )
        return lams


def packed_switch_(
    out: Sequence[Tensor],
    entries: Sequence[PackedTensor],
    old: float | Sequence[float],
    new: float | Sequence[float],
) -> None:
    """Rewrite `out`, which holds W(old), to W(new), once; see `Packed` for the arguments, and for
    many λ."""
    packed = Packed(out, entries)
    packed.holds(old)
    packed.run_(new)


def packed_pair(
    live: Tensor, entry: PackedTensor, span: slice, lam: float
) -> tuple[Tensor, Tensor]:
    """Base and target of the elements `span`, which begins with a tile, from what `live` holds of
    W(λ): copies, on its device.

    Args:
        live: flat; all N elements.

    Numerics: exact where `live` holds W(λ).
    """
    with inference():
        w, codes = live[span].view(torch.int16), entry.element_codes(span)
        above = table(entry.width, entry.dtype, lam).to(w.device)
        b, i, _ = sources(w, codes, above, entry.dtype, lam)
        positions, base, target = entry.exceptions(span)
        for side, values in ((b, base), (i, target)):
            side[positions] = values.view(torch.int16)
        return b.view(entry.dtype), i.view(entry.dtype)


def packed_target(base: Tensor, entry: PackedTensor, span: slice) -> Tensor:
    """Target of the elements `span`, which begins with a tile, from those of the base: a copy."""
    target = base.view(torch.int16) + (entry.element_codes(span) >> 1)
    positions, _, values = entry.exceptions(span)
    target[positions] = values.view(torch.int16)
    return target.view(entry.dtype)


@dataclass(frozen=True)
class Row:
    """One entry: live tensor (flat and detached) and its codes."""

    out: Tensor
    entry: PackedTensor


class _CpuGroup(PackedGroup):
    """All CPU tensors of a `Packed`."""

    def __init__(self, entries: Sequence[int], rows: Sequence[Row]):
        self.entries = tuple(entries)
        self.rows = rows
        self.tensors = [row.out for row in rows]
        self.lams, self.olds = (
            torch.zeros(len(rows), dtype=torch.float32, device="cpu") for _ in range(2)
        )
        self.sums = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
        self.wrong = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        self.pieces = [
            (at, piece) for at, row in enumerate(rows) for piece in _pieces(row.out.numel())
        ]

    def launch_(self) -> None:
        refuse_flushed_denormals()
        olds, news = self.olds.tolist(), self.lams.tolist()
        kinds = [
            (row.entry.width, row.entry.dtype, old, new)
            for row, old, new in zip(self.rows, olds, news)
        ]
        counts: Counter[Kind] = Counter()
        for kind, row in zip(kinds, self.rows):
            counts[kind] += row.out.numel()
        with inference():
            ways = {
                kind: Way(*kind, tabled=count > FEW)
                for kind, count in counts.items()
                if kind[2] != kind[3]
            }

        def write(at: tuple[int, slice]) -> tuple[int, int]:
            k, piece = at
            row = self.rows[k]
            with inference():
                live = row.out[piece]
                before = piece_checksum(live, chunk := piece.start * live.itemsize // CHUNK_BYTES)
                if kinds[k] not in ways:
                    return before, before
                switch_piece_(live, row.entry, piece, ways[kinds[k]])
                return before, piece_checksum(live, chunk)

        found, left = [0] * len(self.rows), [0] * len(self.rows)
        for (k, _), (before, after) in zip(self.pieces, over_cores(write, self.pieces)):
            found[k], left[k] = found[k] + before, left[k] + after
        for k, expected in enumerate(self.sums.tolist()):
            self.wrong[k] |= (found[k] - expected) % 2**64 != 0
            self.sums[k] = (left[k] + 2**63) % 2**64 - 2**63
        self.olds.copy_(self.lams)


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE))


def _triton_groups(rows: Sequence[Row], entries: Sequence[int]) -> list[PackedGroup]:
    if not entries:
        return []
    from pa_kernels import packed_triton

    kinds: dict[tuple[object, ...], list[int]] = {}
    for t in entries:
        kinds.setdefault((rows[t].out.device, rows[t].out.dtype, rows[t].entry.width), []).append(t)
    return [packed_triton.Group(members, [rows[t] for t in members]) for members in kinds.values()]


def _checked(out: Sequence[Tensor], entries: Sequence[PackedTensor]) -> list[Row]:
    if len(out) != len(entries):
        raise ValueError(
            f"{len(out)} live tensors, {len(entries)} packed: expected as many of each"
        )
    rows: list[Row] = []
    for t, (w, entry) in enumerate(zip(out, entries)):
        if not isinstance(w, Tensor) or w.dtype not in MANTISSA:
            found = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"entry {t}: live is {found}, expected a tensor of bfloat16 or float16")
        if not isinstance(entry, PackedTensor):
            raise TypeError(f"entry {t}: packed is {type(entry).__name__}, expected a PackedTensor")
        if not w.is_contiguous():
            raise ValueError(
                f"entry {t}: live has strides {w.stride()} for shape {tuple(w.shape)}, expected"
                " contiguous"
            )
        if w.device.type not in ("cpu", "cuda"):
            raise ValueError(f"entry {t}: on {w.device}, expected cpu or cuda")
        if w.numel() != entry.numel or w.dtype != entry.dtype:
            raise ValueError(
                f"entry {t}: live has {w.numel()} {w.dtype}, the codes are for {entry.numel}"
                f" {entry.dtype}"
            )
        if entry.codes.device != w.device and not (
            w.device.type == "cuda" and entry.codes.is_pinned()
        ):
            raise ValueError(
                f"entry {t}: codes are on {entry.codes.device}, the live tensor on {w.device}"
            )
        try:
            entry.check()
        except ValueError as error:
            raise ValueError(f"entry {t}: {error}") from None
        rows.append(Row(w.detach().view(-1), entry))
    return rows

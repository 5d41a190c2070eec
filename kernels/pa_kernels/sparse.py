"""The sparse set: deltas that live at positions only, in as few bytes as these need, and live
tensors rewritten in place there for any λ, with the bits of `reference.lerp`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.cores import inference, over_cores, parallel_map
from pa_kernels.dense import lerp_piece_
from pa_kernels.parts import check_index, check_last, check_part, check_starts
from pa_kernels.reference import BITMAP_TILE, BITS, INDEX_TILE, LIVE_DTYPES
from pa_kernels.switch import (
    Switch,
    SwitchGroup,
    SwitchRow,
    check_place,
    check_tensor,
    checked_intermediate,
    columns,
    refuse_flushed_denormals,
)
from pa_kernels.tiles import is_on_cpu

SparseKind = Literal["index", "bitmap"]

TILE: dict[SparseKind, int] = {"index": INDEX_TILE, "bitmap": BITMAP_TILE}
WHERE_DTYPE: dict[SparseKind, torch.dtype] = {"index": torch.uint16, "bitmap": torch.int32}

SPAN = 1 << 20
"""Elements, or entries, per unit of work of encoding and checking: whole tiles of either kind, and
scratch of a few MB."""

PIECE = 1 << 17
"""Positions per unit of work of a switch on the CPU: a piece of half as many costs 4–7 % more each,
larger ones gain nothing."""

PREFETCHED = 1 << 13
"""Positions whose cache lines are loaded before any of them is stored to: they are still in a
core's L2 then."""

LINE_BYTES = 64


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """P of the N elements of a tensor, ascending, with the base's and the target's value at each;
    elsewhere the two agree.

    Attributes:
        kind: how the positions are kept, "index" or "bitmap".
        numel: N; a position is an element's row-major place.
        where: index: uint16 [P], places within tiles of 65,536 elements, tile after tile. bitmap:
            int32 [128·⌈N/4096⌉], element e is bit e mod 32 of word e div 32; bits past N are 0.
        starts: int64 [tiles + 1], entries before each tile, and P; a bitmap's tiles have 4,096
            elements.
        base, target: [P], bf16, fp16 or fp32, each in its own dtype.

    Cost:
        Bytes of an index list: 2·P + 8·(⌈N/65,536⌉ + 1); of a bitmap: 520·⌈N/4096⌉ + 8, or 0.127
        per element. Either way |base| + |target| per position beside them: 4 where both are bf16.
        So an index list is the smaller one up to a density of 0.0634 (1/16 but for `starts`),
        whatever the dtypes.
    """

    kind: SparseKind
    numel: int
    where: Tensor
    starts: Tensor
    base: Tensor
    target: Tensor

    @classmethod
    def encode(
        cls,
        where: Tensor,
        base: Tensor,
        target: Tensor,
        numel: int,
        *,
        kind: SparseKind | None = None,
    ) -> SparseTensor:
        """Encode values at given positions of a tensor of N elements.

        Args:
            where: bool mask of N elements, or int64 [P] positions, ascending.
            base, target: values at the positions, [P]; bf16, fp16 or fp32. Kept as they are, not
                copied.
            numel: N.
            kind: of the result; by default the one that takes fewer bytes.

        Cost:
            Scratch for SPAN elements per core beside the result. All of it happens where `where`
            is.

        Raises:
            ValueError, TypeError: the positions do not ascend, lie outside, or are not as many as
                the values.
        """
        base, target = (values.detach().reshape(-1).contiguous() for values in (base, target))
        count = base.numel()
        if kind is None:
            kind = smaller_kind(numel, count)
        packed, starts = _packed(kind, numel, _local(where, numel), where)
        if int(starts[-1]) != count:
            raise ValueError(
                f"{int(starts[-1])} positions and {count} base values, expected as many of each"
            )
        encoded = cls(kind, numel, packed, starts, base, target)
        encoded._check_form()
        return encoded

    def as_index(self) -> SparseTensor:
        """The same positions as an index list, beside the same values; of a bitmap on the CPU, a
        copy of the positions."""
        if self.kind == "index":
            return self
        where, starts = _packed(
            "index", self.numel, functools.partial(_of_bitmap, self.where), self.where
        )
        return SparseTensor("index", self.numel, where, starts, self.base, self.target)

    @property
    def count(self) -> int:
        """P."""
        return self.base.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.where, self.starts, self.base, self.target))

    def positions(self) -> Tensor:
        """The positions, int64 [P] ascending, decoded in the plainest way: up to 20 bytes of
        scratch per position or element."""
        if self.kind == "index":
            return reference.index_positions(self.where, self.starts)
        return reference.bitmap_positions(self.where)

    def check(self) -> None:
        """Refuse whatever would make a kernel touch memory that is not the tensor's; the values may
        be anything.

        Cost: one read of `where` and `starts`, in bounded memory.

        Raises:
            ValueError: saying what it is and what was expected.
        """
        self._check_form()
        if self.kind == "index":
            check_index(self.where, self.starts, INDEX_TILE, self.numel)
        else:
            self._check_bitmap()

    def _check_form(self) -> None:
        if self.kind not in TILE:
            raise ValueError(f"kind is {self.kind!r}, expected 'index' or 'bitmap'")
        if type(self.numel) is not int or self.numel < 0:
            raise ValueError(f"numel is {self.numel!r}, expected a number of elements")
        count, tiles, device = self.count, -(-self.numel // TILE[self.kind]), self.base.device
        words = count if self.kind == "index" else tiles * (BITMAP_TILE // 32)
        check_part("where", self.where, (WHERE_DTYPE[self.kind],), words, device)
        check_part("starts", self.starts, (torch.int64,), tiles + 1, device)
        check_part("base", self.base, LIVE_DTYPES, count, device)
        check_part("target", self.target, LIVE_DTYPES, count, device)
        check_starts(self.starts, count)

    def _check_bitmap(self) -> None:
        words = BITMAP_TILE // 32

        def check_span(first: int) -> None:
            span = self.where[first * words : first * words + SPAN // 32]
            counts = _ones(span).view(-1, words).sum(1)
            expected = self.starts[first : first + SPAN // BITMAP_TILE + 1].diff()
            wrong = (counts != expected).nonzero().view(-1)
            if wrong.numel():
                k = int(wrong[0])
                raise ValueError(
                    f"{int(counts[k])} bits are set in tile {first + k},"
                    f" expected {int(expected[k])} by starts"
                )

        tiles = self.starts.numel() - 1
        parallel_map(check_span, range(0, tiles, SPAN // BITMAP_TILE), self.where)
        last = reference.bitmap_positions(self.where[-words:])[-1:] + (tiles - 1) * BITMAP_TILE
        if last.numel():
            check_last(int(last), self.numel)


def position_bytes(kind: SparseKind, numel: int, count: int) -> int:
    """Bytes that `count` positions in `numel` elements take, values apart."""
    tiles = -(-numel // TILE[kind])
    return 8 * (tiles + 1) + (2 * count if kind == "index" else tiles * BITMAP_TILE // 8)


def smaller_kind(numel: int, count: int) -> SparseKind:
    """Return the kind in which `count` positions in `numel` elements take fewer bytes."""
    return min(TILE, key=lambda kind: position_bytes(kind, numel, count))


def sparse_bytes(numel: int, count: int, value_bytes: int) -> int:
    """Return the bytes of a sparse tensor of the smaller kind; `value_bytes` are those of a base
    and a target."""
    return position_bytes(smaller_kind(numel, count), numel, count) + value_bytes * count


Local = Callable[[int], Tensor]
"""Positions in [start, start + SPAN), less start: int64, ascending."""


def _local(where: Tensor, numel: int) -> Local:
    if where.dtype == torch.bool:
        if where.numel() != numel:
            raise ValueError(f"a mask of {where.numel()} elements for a tensor of {numel}")
        return functools.partial(_of_mask, where.reshape(-1))
    if where.dtype != torch.int64 or where.dim() != 1:
        raise TypeError(
            f"positions are {where.dtype} {tuple(where.shape)}, expected int64 [P] or a bool mask"
        )
    return _of_positions(where, numel)


def _of_mask(mask: Tensor, start: int) -> Tensor:
    return mask[start : start + SPAN].nonzero().view(-1)


def _of_bitmap(words: Tensor, start: int) -> Tensor:
    packed = words[start // 32 : (start + SPAN) // 32].view(torch.uint8).int()
    return torch.index_select(_eight_flags(), 0, packed).view(torch.bool).nonzero().view(-1)


def _of_positions(positions: Tensor, numel: int) -> Local:
    def check_span(first: int) -> None:
        piece = positions[first : first + SPAN + 1]
        wrong = (piece[1:] <= piece[:-1]).nonzero().view(-1)
        if wrong.numel():
            k = int(wrong[0])
            raise ValueError(
                f"position {int(piece[k + 1])} follows {int(piece[k])}, expected ascending"
            )

    parallel_map(check_span, range(0, positions.numel() - 1, SPAN), positions)
    if positions.numel() and not 0 <= int(positions[0]) <= int(positions[-1]) < numel:
        raise ValueError(
            f"positions from {int(positions[0])} to {int(positions[-1])}, expected within {numel}"
            " elements"
        )
    edges = torch.arange(0, numel + SPAN, SPAN, device=positions.device)
    cuts = torch.searchsorted(positions, edges).tolist()
    return lambda start: positions[cuts[start // SPAN] : cuts[start // SPAN + 1]] - start


def _packed(kind: SparseKind, numel: int, local: Local, like: Tensor) -> tuple[Tensor, Tensor]:
    """`where` and `starts` of these positions, made span by span on the device of `like`."""
    tile = TILE[kind]

    def pack(start: int) -> tuple[Tensor, Tensor]:
        tiles = -(-min(SPAN, numel - start) // tile)
        places = local(start)
        edges = torch.arange(tiles + 1, device=like.device) * tile
        counts = torch.searchsorted(places, edges).diff()
        if kind == "index":
            return (places % INDEX_TILE).to(torch.uint16), counts
        flags = torch.zeros(tiles * tile, dtype=torch.bool, device=like.device)
        return _words(flags.index_fill_(0, places, True)), counts

    parts = parallel_map(pack, range(0, numel, SPAN), like)
    where = torch.cat(
        [
            torch.empty(0, dtype=WHERE_DTYPE[kind], device=like.device),
            *(where for where, _ in parts),
        ]
    )
    counts = torch.cat(
        [torch.zeros(1, dtype=torch.int64, device=like.device), *(counts for _, counts in parts)]
    )
    return where, counts.cumsum(0)


def _words(flags: Tensor) -> Tensor:
    """int32 words of a bool tensor, element e in bit e mod 32."""
    # eight bytes of 0 or 1, times this, have their bits side by side in the top byte
    packed = (flags.view(torch.int64) * 0x0102040810204080) >> 56
    return (packed & 0xFF).to(torch.uint8).view(torch.int32)


@functools.cache
def _eight_flags() -> Tensor:
    """For each byte its eight bits as bools, in one int64: a look-up unpacks ten times faster than
    shifts."""
    return (
        ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1)
        .bool()
        .view(torch.int64)
        .view(-1)
    )


def _ones(words: Tensor) -> Tensor:
    """Return the number of set bits of each int32."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


class Sparse(Switch[SwitchGroup[SwitchRow]]):
    """T live tensors, each with a delta that lives at positions only, prepared once so that any λ
    costs one pass over these.

    Args:
        out: live tensors, rewritten in place at the positions; contiguous bf16, fp16 or fp32.
            Elsewhere they must hold what base and target share, rounded to their dtype: those
            elements are neither read nor written.
        entries: a `SparseTensor` for each, where the live tensor is, with as many elements. Checked
            here: whatever a file held, no write leaves its tensor. They must not change afterwards.
        intermediate_dtypes: for each tensor the dtype that its result is rounded to before its own,
            or None.

    Numerics:
        Bit for bit `reference.lerp` at the positions, whatever λ came before; λ = 0 restores the
        base's bits, and λ = 1 gives the target's, where they have the live dtype.

    Cost:
        Preparing reads the positions once. A switch reads the entries, 6 bytes each for bf16 and an
        index list, and touches a sector of the live tensor for nearly every one of them. On the CPU
        bitmaps are unpacked into index lists first, which takes 2 bytes more per position, because
        unpacking at every switch would cost more than a dense pass.

    Raises:
        ValueError, TypeError: naming entry t, what it is and what was expected.
    """

    def __init__(
        self,
        out: Sequence[Tensor],
        entries: Sequence[SparseTensor],
        intermediate_dtypes: Sequence[torch.dtype | None] | None = None,
    ):
        lists = {
            "live tensors": out,
            "sparse": entries,
            "intermediate dtypes": intermediate_dtypes,
        }
        super().__init__([_checked(t, *column) for t, column in enumerate(columns(lists))])

    def _group(self, on_cpu: bool) -> type[SwitchGroup[SwitchRow]]:
        if on_cpu:
            return SparseCpuGroup
        from pa_kernels import sparse_triton

        return sparse_triton.SparseTritonGroup


def sparse_set_(
    out: Sequence[Tensor],
    entries: Sequence[SparseTensor],
    lam: float | Sequence[float],
    *,
    intermediate_dtypes: Sequence[torch.dtype | None] | None = None,
) -> None:
    """Write W(λ) into `out` at the entries' positions, once; see `Sparse` for the arguments, and
    for many λ."""
    Sparse(out, entries, intermediate_dtypes).run_(lam)


def _checked(t: int, w: Tensor, entry: SparseTensor, intermediate: torch.dtype | None) -> SwitchRow:
    check_tensor(t, "live", w)
    if not isinstance(entry, SparseTensor):
        raise TypeError(f"entry {t}: sparse is {type(entry).__name__}, expected a SparseTensor")
    check_place(t, "sparse", entry.where, w, may_be_pinned=True)
    if entry.numel != w.numel():
        raise ValueError(
            f"entry {t}: sparse is of {entry.numel} elements, the live tensor has {w.numel()}"
        )
    try:
        entry.check()
    except ValueError as error:
        raise ValueError(f"entry {t}: {error}") from None
    intermediate = checked_intermediate(t, intermediate, w)
    entry = entry.as_index() if is_on_cpu(w) else entry
    operands = (w.detach().view(-1), entry.where, entry.starts, entry.base, entry.target)
    return SwitchRow(operands, intermediate)


class SparseCpuGroup(SwitchGroup[SwitchRow]):
    """All CPU tensors of a `Sparse`, as index lists. `pieces` are (row, first tile, last tile,
    first entry, last entry)."""

    def __init__(self, entries: Sequence[int], rows: Sequence[SwitchRow]):
        super().__init__(entries, rows)
        self.pieces = [
            (k, *piece) for k, row in enumerate(rows) for piece in _pieces(row.operands[2])
        ]

    def launch_(self) -> None:
        refuse_flushed_denormals()
        lams = self.lams.tolist()

        def write(piece: tuple[int, int, int, int, int]) -> None:
            k, tile, last_tile, entry, last_entry = piece
            w, where, starts, base, target = self.rows[k].operands
            span, count = slice(entry, last_entry), last_entry - entry
            with inference():
                counts = starts[tile : last_tile + 1].diff()
                offsets = torch.arange(tile, last_tile, device="cpu") * INDEX_TILE
                positions = torch.repeat_interleave(offsets, counts, output_size=count)
                positions += where[span].long()
                values = torch.empty(count, dtype=w.dtype, device="cpu")
                intermediate = self.rows[k].intermediate_dtype
                lerp_piece_(values, base[span], target[span], lams[k], intermediate)
                elements = (last_tile - tile) * INDEX_TILE
                alone = count * (LINE_BYTES // values.itemsize) < elements
                _scatter_(w, positions, values, alone)

        over_cores(write, self.pieces)


def _scatter_(live: Tensor, positions: Tensor, values: Tensor, alone: bool) -> None:
    """live[positions] = values; `alone` says that most positions have a cache line to
    themselves."""
    bits = BITS[live.dtype]
    for here, there in zip(positions.split(PREFETCHED), values.view(bits).split(PREFETCHED)):
        if alone:
            # stores wait for their lines one after another, loads for many at a time: so load what
            # is about to be stored
            torch.index_select(live.view(bits), 0, here)
        live.view(bits).index_copy_(0, here, there)


def _pieces(starts: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """An index list cut between tiles, into runs of about PIECE entries."""
    count = int(starts[-1])
    if count == 0:
        return
    firsts = torch.arange(0, count, PIECE, device="cpu")
    cuts = torch.searchsorted(starts, firsts, right=True) - 1
    for tile, last in pairwise([*cuts.unique().tolist(), starts.numel() - 1]):
        yield tile, last, int(starts[tile]), int(starts[last])

"""The low-rank merge as Triton launches over many matrices of any shapes and ranks: a tile's
product, then B + λ·UV, fused."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels.dense_triton import INTERPRET, dtype_constants, round_twice, widen
from pa_kernels.switch import SwitchGroup, SwitchRow
from pa_kernels.tiles import ALIGNMENT_BYTES, Launch, RowBlocks, table

COLUMNS = 128
"""Width of a tile: whole 128-byte lines of every row; `Launch.block` elements make it block //
COLUMNS rows high."""

STEP = 32
"""Ranks multiplied at a time."""

LAUNCH = Launch(block=8192, threads=256)
"""Two programs or more a multiprocessor at 128 registers, so that one's base is on its way while
another multiplies. Not yet timed on a GPU: chosen from offline compilation; the bench sweeps
CANDIDATES."""

CANDIDATES = (LAUNCH, Launch(8192, 128), Launch(16384, 256), Launch(16384, 512))

EDGE_THREADS = 512
"""Threads of a program where accesses are masked and narrow: their addresses take registers, and
fewer elements each need fewer."""

ALIGNED_COLUMNS = 16
"""Full tiles are only of matrices whose width it divides: each of their rows is aligned then."""

WIDEST = 1 << 23
"""Columns, and ranks, that a tile's 32-bit offsets do not reach any more."""

FULL_STAGES, EDGE_STAGES = 3, 1
"""Steps of factors on their way from L2 while one is multiplied; none where accesses are too narrow
to be copied aside."""


@triton.jit
def lowrank_kernel(
    words,
    heights,
    widths,
    ranks,
    outs,
    bases,
    us,
    vs,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    FACTOR: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    FULL: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = word & 0xFFFFFFFF
    lam = tl.load(lams + t)
    height, width, rank = tl.load(heights + t), tl.load(widths + t), tl.load(ranks + t).to(tl.int32)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    first_column = tile % across * COLUMNS
    first_row = tile // across % down * ROWS
    matrix = tile // across // down
    w_ptr = tl.load(outs + t).to(tl.pointer_type(OUT))
    b_ptr = tl.load(bases + t).to(tl.pointer_type(BASE))
    u_ptr = tl.load(us + t).to(tl.pointer_type(FACTOR))
    v_ptr = tl.load(vs + t).to(tl.pointer_type(FACTOR))
    corner = (matrix * height + first_row) * width + first_column
    u_ptr += (matrix * height + first_row) * rank
    v_ptr += matrix * rank * width + first_column
    rows, columns, steps = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
    below, beside = first_row + rows < height, first_column + columns < width
    width = width.to(tl.int32)
    if FULL:
        width, rank = tl.multiple_of(width, 16), tl.multiple_of(rank, 16)
        w_ptr, b_ptr = tl.multiple_of(w_ptr + corner, 16), tl.multiple_of(b_ptr + corner, 16)
        u_ptr, v_ptr = tl.multiple_of(u_ptr, 16), tl.multiple_of(v_ptr, 16)
    else:
        w_ptr += corner
        b_ptr += corner
    offsets = rows[:, None] * width + columns[None, :]
    mask = below[:, None] & beside[None, :]
    # asked for before the product, so that it arrives behind it
    b = tl.load(b_ptr + offsets) if FULL else tl.load(b_ptr + offsets, mask=mask)
    if lam == 0.0:
        w = b if BASE == OUT and INTERMEDIATE == OUT else round_twice(widen(b), OUT, INTERMEDIATE)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        u_offsets = rows[:, None] * rank + steps[None, :]
        v_offsets = steps[:, None] * width + columns[None, :]
        # numpy 2.4 refuses the interpreter's own way from a tensor to a loop's bound
        for k in range(0, rank.handle.data.item() if INTERPRET else rank, STEP):
            in_rank = k + steps < rank
            if FULL:
                u = tl.load(u_ptr + u_offsets, mask=in_rank[None, :], other=0.0)
                v = tl.load(v_ptr + v_offsets, mask=in_rank[:, None], other=0.0)
            else:
                u = tl.load(u_ptr + u_offsets, mask=below[:, None] & in_rank[None, :], other=0.0)
                v = tl.load(v_ptr + v_offsets, mask=in_rank[:, None] & beside[None, :], other=0.0)
            if INTERPRET:
                u, v = widen(u), widen(v)
            total = tl.dot(u, v, total, input_precision="ieee")
            u_ptr += STEP
            v_ptr += STEP * width
        # the outer fma's weight is never positive and the inner one makes every zero +0: where UV
        # is 0 it adds −0, and a −0 of the base stays
        delta = tl.fma(total, tl.where(lam > 0, -1.0, 1.0), 0.0)
        w = round_twice(tl.fma(delta, -tl.abs(lam), widen(b)), OUT, INTERMEDIATE)
    if FULL:
        tl.store(w_ptr + offsets, w)
    else:
        tl.store(w_ptr + offsets, w, mask=mask)


def constants(
    dtypes: Sequence[torch.dtype],
    intermediate_dtype: torch.dtype | None,
    full: bool,
    launch: Launch = LAUNCH,
) -> dict[str, Any]:
    """The constexpr arguments of `lowrank_kernel`; `full` tiles need no masks and have every
    address aligned."""
    return {
        **dtype_constants(("OUT", "BASE", "FACTOR"), dtypes[:3], intermediate_dtype),
        "ROWS": launch.block // COLUMNS,
        "COLUMNS": COLUMNS,
        "STEP": STEP,
        "FULL": full,
    }


def options(dtypes: Sequence[torch.dtype], full: bool) -> dict[str, Any]:
    """Fusion is off because its default may change: the fma is written out.

    Where all is 16-bit, 128 registers are asked for, so that two programs share a multiprocessor of
    NVIDIA's: Triton 3.9 reads factors ahead into 155 for sm_80, and under this bound needs 126,
    without spills.
    """
    narrow = full and {dtype.itemsize for dtype in dtypes} == {2} and torch.version.hip is None
    return {
        "enable_fp_fusion": False,
        "num_stages": FULL_STAGES if full else EDGE_STAGES,
        **({"maxnreg": 128} if narrow else {}),
    }


def launch_for(full: bool, launch: Launch = LAUNCH) -> Launch:
    """The launch of full tiles, or of the others, which are cut alike."""
    return launch if full else Launch(launch.block, EDGE_THREADS)


class LowRankTritonGroup(SwitchGroup[SwitchRow]):
    """Matrices of one (out, base, factors, intermediate) dtype tuple on one device, ready to be
    launched for any λ.

    Whole aligned tiles are one launch, all others, if there are any, a second one with masks: in
    one kernel the masked path would set the registers of both.
    """

    def __init__(self, entries: Sequence[int], rows: Sequence[SwitchRow], launch: Launch = LAUNCH):
        super().__init__(entries, rows)
        self.launch = launch
        step = launch.block // COLUMNS
        self.cuts = [RowBlocks(row.out.shape[0], row.out.shape[1], step) for row in rows]
        sizes = [(*row.out.shape[1:], row.operands[2].shape[2]) for row in rows]
        for t, (_, width, rank) in zip(entries, sizes):
            if max(width, rank) >= WIDEST:
                raise ValueError(
                    f"entry {t}: {width} columns of rank {rank}, expected fewer than {WIDEST}"
                )
        addresses = [[tensor.data_ptr() for tensor in row.operands] for row in rows]
        self.sizes, self.pointers = (
            table(list(zip(*values)), self.device) for values in (sizes, addresses)
        )
        words = [self._words(index, cut.all) for index, cut in enumerate(self.cuts)]
        self.words = [torch.cat(kind).to(self.device) for kind in zip(*words)]

    def launch_(self) -> None:
        self._launch_(self.words, self.pointers, self.lams)

    def merge_blocks_(self, aside: Tensor, index: int, blocks: range, lam: float) -> None:
        """Write these blocks of W(λ) of a row into `aside`, which has as many rows, by the very
        tiles that `launch_` would run there."""
        pointers = self.pointers.clone()
        # where the whole tensor would begin; nothing before `aside` is touched
        first = self.cuts[index].rows(blocks).start
        pointers[0, index] = aside.data_ptr() - first * aside.shape[1] * aside.itemsize
        words = [kind.to(self.device) for kind in self._words(index, blocks)]
        self._launch_(words, pointers, torch.full_like(self.lams, lam))

    def _words(self, index: int, blocks: range) -> tuple[Tensor, Tensor]:
        """Words of the full tiles in these blocks of rows, then of the others: tensor << 32 |
        tile."""
        row, cut = self.rows[index], self.cuts[index]
        _, height, width = row.out.shape
        across = -(-width // COLUMNS)
        tile = torch.arange(blocks.start * across, blocks.stop * across, device="cpu")
        aligned = all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in row.operands)
        full = torch.full_like(tile, aligned and width % ALIGNED_COLUMNS == 0, dtype=torch.bool)
        if across:
            full &= (tile % across + 1) * COLUMNS <= width
            full &= (tile // across % cut.per_matrix + 1) * cut.step <= height
        words = index << 32 | tile
        return words[full], words[~full]

    def _launch_(self, words: Sequence[Tensor], pointers: Tensor, lams: Tensor) -> None:
        first = self.rows[0]
        for kind, full in zip(words, (True, False)):
            launch_for(full, self.launch).start(
                lowrank_kernel,
                kind.numel(),
                self.device,
                kind,
                *self.sizes,
                *pointers,
                lams,
                **constants(first.dtypes, first.intermediate_dtype, full, self.launch),
                **options(first.dtypes, full),
            )

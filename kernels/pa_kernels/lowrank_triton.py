"""The low-rank merge as Triton launches over many matrices of any shapes and ranks: a tile's
product, then B + λ·UV, fused."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels.lerp_triton import TRITON_DTYPES, round_via, widen
from pa_kernels.lowrank import RANK_STEP, Row, padded
from pa_kernels.tiles import ALIGNMENT_BYTES, INTERPRETED, Launch

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
fewer lanes each need fewer."""

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
    VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    FULL: tl.constexpr,
    INTERPRET: tl.constexpr,
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
    w_ptr, b_ptr = (
        tl.load(outs + t).to(tl.pointer_type(OUT)),
        tl.load(bases + t).to(tl.pointer_type(BASE)),
    )
    u_ptr, v_ptr = (
        tl.load(us + t).to(tl.pointer_type(FACTOR)),
        tl.load(vs + t).to(tl.pointer_type(FACTOR)),
    )
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
    lanes = rows[:, None] * width + columns[None, :]
    # asked for before the product, so that it arrives behind it
    b = (
        tl.load(b_ptr + lanes)
        if FULL
        else tl.load(b_ptr + lanes, mask=below[:, None] & beside[None, :])
    )
    if lam == 0.0:
        w = b if BASE == OUT and VIA == OUT else round_via(widen(b, INTERPRET), OUT, VIA, INTERPRET)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        u_lanes, v_lanes = (
            rows[:, None] * rank + steps[None, :],
            steps[:, None] * width + columns[None, :],
        )
        # numpy 2.4 refuses the interpreter's own way from a tensor to a loop's bound
        for k in range(0, rank.handle.data.item() if INTERPRET else rank, STEP):
            left = k + steps < rank
            if FULL:
                u = tl.load(u_ptr + u_lanes, mask=left[None, :], other=0.0)
                v = tl.load(v_ptr + v_lanes, mask=left[:, None], other=0.0)
            else:
                u = tl.load(u_ptr + u_lanes, mask=below[:, None] & left[None, :], other=0.0)
                v = tl.load(v_ptr + v_lanes, mask=left[:, None] & beside[None, :], other=0.0)
            if INTERPRET:
                u, v = widen(u, INTERPRET), widen(v, INTERPRET)
            total = tl.dot(u, v, total, input_precision="ieee")
            u_ptr += STEP
            v_ptr += STEP * width
        # the outer fma's weight is never positive and the inner one makes every zero +0: where UV
        # is 0 it adds −0, and a −0 of the base stays
        delta = tl.fma(total, tl.where(lam > 0, -1.0, 1.0), 0.0)
        w = round_via(tl.fma(delta, -tl.abs(lam), widen(b, INTERPRET)), OUT, VIA, INTERPRET)
    if FULL:
        tl.store(w_ptr + lanes, w)
    else:
        tl.store(w_ptr + lanes, w, mask=below[:, None] & beside[None, :])


def constants(
    out: torch.dtype,
    base: torch.dtype,
    factor: torch.dtype,
    via: torch.dtype | None,
    full: bool,
    launch: Launch = LAUNCH,
) -> dict[str, Any]:
    """The constexpr arguments of `lowrank_kernel`; `full` tiles need no masks and have every
    address aligned."""
    names = {"OUT": out, "BASE": base, "FACTOR": factor, "VIA": via or out}
    dtypes = {name: TRITON_DTYPES[dtype] for name, dtype in names.items()}
    shape = {"ROWS": launch.block // COLUMNS, "COLUMNS": COLUMNS, "STEP": STEP}
    return {**dtypes, **shape, "FULL": full, "INTERPRET": INTERPRETED}


def options(out: torch.dtype, base: torch.dtype, factor: torch.dtype, full: bool) -> dict[str, Any]:
    """Fusion is off because its default may change: the fma is written out.

    Where all is 16-bit, 128 registers are asked for, so that two programs share a multiprocessor of
    NVIDIA's: Triton 3.9 reads factors ahead into 155 for sm_80, and under this bound needs 126,
    without spills.
    """
    narrow = (
        full and out.itemsize == base.itemsize == factor.itemsize == 2 and torch.version.hip is None
    )
    return {
        "enable_fp_fusion": False,
        "num_stages": FULL_STAGES if full else EDGE_STAGES,
        **({"maxnreg": 128} if narrow else {}),
    }


def launch_for(full: bool, launch: Launch = LAUNCH) -> Launch:
    """The launch of full tiles, or of the others, which are cut alike."""
    return launch if full else Launch(launch.block, EDGE_THREADS)


class Group:
    """Matrices of one (out, base, factors, via) dtype tuple on one device, ready to be launched for
    any λ.

    Whole aligned tiles are one launch, all others, if there are any, a second one with masks: in
    one kernel the masked path would set the registers of both.

    Attributes:
        entries: places of the group's tensors in the caller's lists.
        lams: fp32 [T] on the device; what the next launch reads, a replayed CUDA graph included.
    """

    def __init__(self, entries: Sequence[int], rows: Sequence[Row], launch: Launch = LAUNCH):
        self.entries = tuple(entries)
        self.launch = launch
        self.height = launch.block // COLUMNS
        self.rows = [Row(row.out, row.base, *padded(row.u, row.v), row.via) for row in rows]
        self.device = rows[0].out.device
        self.lams = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
        for t, row in zip(entries, self.rows):
            if max(row.out.shape[2], row.u.shape[2]) >= WIDEST:
                raise ValueError(
                    f"entry {t}: {row.out.shape[2]} columns of rank {row.u.shape[2]}, expected"
                    f" fewer than {WIDEST}"
                )
        sizes = [(row.out.shape[1], row.out.shape[2], row.u.shape[2]) for row in self.rows]
        addresses = [
            [tensor.data_ptr() for tensor in (row.out, row.base, row.u, row.v)] for row in self.rows
        ]
        self.sizes = (
            torch.tensor(sizes, dtype=torch.int64, device="cpu").t().contiguous().to(self.device)
        )
        self.pointers = (
            torch.tensor(addresses, dtype=torch.int64, device="cpu")
            .t()
            .contiguous()
            .to(self.device)
        )
        words = [
            self._words(place, range(row.blocks(self.height)))
            for place, row in enumerate(self.rows)
        ]
        self.words = [torch.cat(kind).to(self.device) for kind in zip(*words)]

    def launch_(self) -> None:
        """Rewrite the live tensors for the λ in `lams`. Touches device memory only, so a CUDA graph
        can record it."""
        self._launch_(self.words, self.pointers, self.lams)

    def merged(self, place: int, rows: slice, lam: float) -> Tensor:
        """Rows of W(λ), seen as [E·M, N], by the very tiles that `launch_` would run there, written
        aside."""
        row = self.rows[place]
        blocks = row.covering(rows, self.height)
        first, last = row.span(blocks, self.height)
        made = torch.empty(last - first, row.out.shape[2], dtype=row.out.dtype, device=self.device)
        pointers = self.pointers.clone()
        # where the whole tensor would begin; nothing before `made` is touched
        pointers[0, place] = made.data_ptr() - first * made.shape[1] * made.itemsize
        words = [kind.to(self.device) for kind in self._words(place, blocks)]
        self._launch_(words, pointers, torch.full_like(self.lams, lam))
        return made[rows.start - first : rows.stop - first]

    def _words(self, place: int, blocks: range) -> tuple[Tensor, Tensor]:
        """Words of the full tiles in these blocks of rows, then of the others: tensor << 32 |
        tile."""
        row = self.rows[place]
        _, height, width = row.out.shape
        across, down = -(-width // COLUMNS), row.blocks(self.height) // max(row.out.shape[0], 1)
        tile = torch.arange(blocks.start * across, blocks.stop * across, device="cpu")
        aligned = all(
            tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in (row.out, row.base, row.u, row.v)
        )
        full = torch.full_like(tile, aligned and width % RANK_STEP == 0, dtype=torch.bool)
        if across:
            full &= (tile % across + 1) * COLUMNS <= width
            full &= (tile // across % down + 1) * self.height <= height
        words = place << 32 | tile
        return words[full], words[~full]

    def _launch_(self, words: Sequence[Tensor], pointers: Tensor, lams: Tensor) -> None:
        first = self.rows[0]
        dtypes = first.out.dtype, first.base.dtype, first.u.dtype
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            for kind, full in zip(words, (True, False)):
                if kind.numel():
                    lowrank_kernel[(kind.numel(),)](
                        kind,
                        *self.sizes,
                        *pointers,
                        lams,
                        **constants(*dtypes, first.via, full, self.launch),
                        num_warps=launch_for(full, self.launch).num_warps(),
                        **options(*dtypes, full),
                    )

"""The sparse set as one Triton launch per group of tensors that share dtypes, kind and device."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels.dense_triton import dtype_constants, lerp_of
from pa_kernels.reference import BITMAP_TILE, INDEX_TILE
from pa_kernels.switch import SwitchRow, TritonGroup
from pa_kernels.tiles import Launch, table

LAUNCHES = {
    "index": Launch(block=512, threads=64),
    "bitmap": Launch(block=BITMAP_TILE, threads=512),
}
"""`block` is the entries that a program takes at a time from its tile's run, or the elements of a
bitmap's tile. Not yet timed on a GPU: chosen from offline compilation, CANDIDATES being what a GPU
has to decide between."""

CANDIDATES = {
    "index": tuple(Launch(8 * threads, threads) for threads in (32, 64, 128, 256)),
    "bitmap": tuple(Launch(BITMAP_TILE, threads) for threads in (256, 512, 1024)),
}

VECTOR = 8
"""Entries that one thread reads together: 128 bits of 16-bit places and values."""


@triton.jit
def set_entries(
    w_ptr,
    where_ptr,
    b_ptr,
    i_ptr,
    lam,
    entry,
    first,
    end,
    INTERMEDIATE: tl.constexpr,
    COUNT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Set those entries in [first, end) that are among the COUNT from `entry` on. A VECTOR > 1
    promises that `entry` is a multiple of it, that the arrays are 16-byte aligned, and that they
    hold the whole of the vector in which the run ends.
    """
    offsets = tl.arange(0, COUNT)
    stop = tl.minimum(end - entry, COUNT).to(tl.int32)
    mask = (offsets >= (first - entry).to(tl.int32)) & (offsets < stop)
    needed = mask
    where_ptr += entry
    b_ptr += entry
    i_ptr += entry
    if VECTOR > 1:
        # neighbours' entries are read, not set: a mask that cuts vectors would break the loads into
        # single elements
        needed = offsets // VECTOR < (stop + VECTOR - 1) // VECTOR
        where_ptr = tl.multiple_of(where_ptr, 16)
        b_ptr, i_ptr = tl.multiple_of(b_ptr, 16), tl.multiple_of(i_ptr, 16)
    position = tl.load(where_ptr + offsets, mask=needed, other=0)
    b = tl.load(b_ptr + offsets, mask=needed, other=0)
    i = tl.load(i_ptr + offsets, mask=needed, other=0)
    w = lerp_of(b, i, lam, w_ptr.dtype.element_ty, INTERMEDIATE)
    tl.store(w_ptr + position.to(tl.int32), w, mask=mask)


@triton.jit
def index_kernel(
    words,
    sizes,
    outs,
    wheres,
    starts,
    bases,
    insts,
    lams,
    counts,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = (word & 0xFFFFFFFF) >> 1
    lam = tl.load(lams + t)
    count = tl.load(counts + t)
    starts_ptr = tl.load(starts + t).to(tl.pointer_type(tl.int64)) + tile
    first, end = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    w_ptr = tl.load(outs + t).to(tl.pointer_type(OUT)) + tile * TILE
    where_ptr = tl.load(wheres + t).to(tl.pointer_type(tl.uint16))
    b_ptr = tl.load(bases + t).to(tl.pointer_type(BASE))
    i_ptr = tl.load(insts + t).to(tl.pointer_type(INST))
    whole = (word & 1) * (count // VECTOR * VECTOR)
    entry = first // VECTOR * VECTOR
    while entry < end:
        if tl.minimum(end, entry + BLOCK) <= whole:
            set_entries(
                w_ptr, where_ptr, b_ptr, i_ptr, lam, entry, first, end, INTERMEDIATE, BLOCK, VECTOR
            )
            entry += BLOCK
        else:
            set_entries(
                w_ptr, where_ptr, b_ptr, i_ptr, lam, entry, first, end, INTERMEDIATE, TAIL, 1
            )
            entry += TAIL


@triton.jit
def ones(words):
    """Return the number of set bits of each uint32; compilers know this form and make one
    instruction of it."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bitmap_kernel(
    words,
    sizes,
    outs,
    wheres,
    starts,
    bases,
    insts,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = (word & 0xFFFFFFFF) >> 1
    lam = tl.load(lams + t)
    first = tl.load(tl.load(starts + t).to(tl.pointer_type(tl.int64)) + tile)
    w_ptr = tl.load(outs + t).to(tl.pointer_type(OUT)) + tile * BLOCK
    where_ptr = tl.load(wheres + t).to(tl.pointer_type(tl.uint32)) + tile * (BLOCK // 32)
    b_ptr = tl.load(bases + t).to(tl.pointer_type(BASE)) + first
    i_ptr = tl.load(insts + t).to(tl.pointer_type(INST)) + first
    # set bits before each word, handed to its 32 elements, and before each element within its word
    set_bits = ones(tl.load(where_ptr + tl.arange(0, BLOCK // 32)))
    before = tl.cumsum(set_bits, 0) - set_bits
    before = tl.reshape(tl.broadcast_to(before[:, None], (BLOCK // 32, 32)), (BLOCK,))
    offsets = tl.arange(0, BLOCK)
    flags = tl.load(where_ptr + offsets // 32)
    bit = tl.full((BLOCK,), 1, tl.uint32) << (offsets % 32).to(tl.uint32)
    mask = (flags & bit) != 0
    rank = before + ones(flags & (bit - 1))
    b = tl.load(b_ptr + rank, mask=mask, other=0)
    i = tl.load(i_ptr + rank, mask=mask, other=0)
    tl.store(w_ptr + offsets, lerp_of(b, i, lam, OUT, INTERMEDIATE), mask=mask)


KERNELS = {"index": index_kernel, "bitmap": bitmap_kernel}


def constants(
    kind: str,
    dtypes: Sequence[torch.dtype],
    intermediate_dtype: torch.dtype | None,
    launch: Launch,
) -> dict[str, Any]:
    """The constexpr arguments of a kind's kernel, for the dtypes of live tensor, base and
    target."""
    values = dtype_constants(("OUT", "BASE", "INST"), dtypes, intermediate_dtype)
    values["BLOCK"] = launch.block
    if kind == "index":
        values |= {"TILE": INDEX_TILE, "TAIL": 2 * launch.threads, "VECTOR": VECTOR}
    return values


class SparseTritonGroup(TritonGroup[SwitchRow]):
    """Tensors of one (out, base, target, intermediate) dtype tuple and one kind of positions on one
    device, ready to be launched for any λ."""

    def __init__(
        self, entries: Sequence[int], rows: Sequence[SwitchRow], launch: Launch | None = None
    ):
        super().__init__(entries, rows)
        out, where, _, base, target = rows[0].dtypes
        kind = "index" if where == torch.uint16 else "bitmap"
        self.kernel = KERNELS[kind]
        self.launch = launch or LAUNCHES[kind]
        self.constants = constants(
            kind, (out, base, target), rows[0].intermediate_dtype, self.launch
        )
        counts = [row.operands[-1].numel() for row in rows]
        self.counts = table(counts, self.device) if kind == "index" else None
        # where nothing is listed there is nothing to launch
        sizes = [row.out.numel() if count else 0 for row, count in zip(rows, counts)]
        self.cut(sizes, INDEX_TILE if kind == "index" else BITMAP_TILE)

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return (self.lams,) if self.counts is None else (self.lams, self.counts)

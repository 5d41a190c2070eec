"""The sparse set as one Triton launch per group of tensors that share dtypes, kind and device."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from pa_kernels import lerp_triton, tiles
from pa_kernels.lerp_triton import OPTIONS, lerp_of
from pa_kernels.reference import BITMAP_TILE, INDEX_TILE
from pa_kernels.sparse_tensor import TILE, Kind
from pa_kernels.tiles import Launch

if TYPE_CHECKING:
    from pa_kernels.sparse import Row

LAUNCHES: dict[Kind, Launch] = {
    "index": Launch(block=512, threads=64),
    "bitmap": Launch(block=BITMAP_TILE, threads=512),
}
"""`block` is the entries that a program takes at a time from its tile's run, or the elements of a
bitmap's tile. Not yet timed on a GPU: chosen from offline compilation, CANDIDATES being what a GPU
has to decide between."""

CANDIDATES: dict[Kind, tuple[Launch, ...]] = {
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
    at,
    first,
    end,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Set those entries in [first, end) that are among the LANES from `at` on. A VECTOR > 1
    promises that `at` is a multiple of it, that the arrays are 16-byte aligned, and that they hold
    the whole of the vector in which the run ends.
    """
    where_ptr = where_ptr.to(tl.pointer_type(tl.uint16))
    b_ptr, i_ptr = b_ptr.to(tl.pointer_type(BASE)), i_ptr.to(tl.pointer_type(INST))
    lanes = tl.arange(0, LANES)
    left = tl.minimum(end - at, LANES).to(tl.int32)
    inside = (lanes >= (first - at).to(tl.int32)) & (lanes < left)
    needed = inside
    if VECTOR > 1:
        # neighbours' entries are read, not set: a mask that cuts vectors would break the loads into
        # single elements
        needed = lanes // VECTOR < (left + VECTOR - 1) // VECTOR
        at = at // VECTOR * VECTOR
        where_ptr, b_ptr, i_ptr = (
            tl.multiple_of(where_ptr, 16),
            tl.multiple_of(b_ptr, 16),
            tl.multiple_of(i_ptr, 16),
        )
    place = tl.load(where_ptr + at + lanes, mask=needed, other=0)
    b = tl.load(b_ptr + at + lanes, mask=needed, other=0)
    i = tl.load(i_ptr + at + lanes, mask=needed, other=0)
    tl.store(
        w_ptr + place.to(tl.int32), lerp_of(b, i, lam, OUT, BASE, INST, VIA, INTERPRET), mask=inside
    )


@triton.jit
def index_kernel(
    words,
    counts,
    outs,
    wheres,
    starts,
    bases,
    insts,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = (word & 0xFFFFFFFF) >> 1
    lam = tl.load(lams + t)
    count = tl.load(counts + t)
    starts_ptr = tl.load(starts + t).to(tl.pointer_type(tl.int64)) + tile
    first, end = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    w_ptr = tl.load(outs + t).to(tl.pointer_type(OUT)) + tile * TILE
    where_ptr, b_ptr, i_ptr = tl.load(wheres + t), tl.load(bases + t), tl.load(insts + t)
    whole = (word & 1) * (count // VECTOR * VECTOR)
    at = first // VECTOR * VECTOR
    while at < end:
        if tl.minimum(end, at + BLOCK) <= whole:
            set_entries(
                w_ptr,
                where_ptr,
                b_ptr,
                i_ptr,
                lam,
                at,
                first,
                end,
                OUT,
                BASE,
                INST,
                VIA,
                BLOCK,
                VECTOR,
                INTERPRET,
            )
            at += BLOCK
        else:
            set_entries(
                w_ptr,
                where_ptr,
                b_ptr,
                i_ptr,
                lam,
                at,
                first,
                end,
                OUT,
                BASE,
                INST,
                VIA,
                TAIL,
                1,
                INTERPRET,
            )
            at += TAIL


@triton.jit
def ones(words):
    """How many bits of each uint32 are set; compilers know this form and make one instruction of
    it."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bitmap_kernel(
    words,
    outs,
    wheres,
    starts,
    bases,
    insts,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
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
    lanes = tl.arange(0, BLOCK)
    flags = tl.load(where_ptr + lanes // 32)
    bit = tl.full((BLOCK,), 1, tl.uint32) << (lanes % 32).to(tl.uint32)
    inside = (flags & bit) != 0
    rank = before + ones(flags & (bit - 1))
    b = tl.load(b_ptr + rank, mask=inside, other=0)
    i = tl.load(i_ptr + rank, mask=inside, other=0)
    tl.store(w_ptr + lanes, lerp_of(b, i, lam, OUT, BASE, INST, VIA, INTERPRET), mask=inside)


def constants(
    kind: Kind,
    out: torch.dtype,
    base: torch.dtype,
    target: torch.dtype,
    via: torch.dtype | None,
    launch: Launch,
) -> dict[str, Any]:
    """The constexpr arguments of a kind's kernel."""
    values = lerp_triton.constants(out, base, target, via, launch)
    if kind == "index":
        return values | {"TILE": INDEX_TILE, "VECTOR": VECTOR}
    del values["TAIL"]
    return values


class Group:
    """Tensors of one (out, base, target, via) dtype tuple and one kind on one device, ready to be
    launched for any λ.

    Attributes:
        entries: places of the group's tensors in the caller's lists.
        lams: fp32 [T] on the device; what the next launch reads, a replayed CUDA graph included.
    """

    def __init__(self, entries: Sequence[int], rows: Sequence[Row], launch: Launch | None = None):
        self.entries = tuple(entries)
        self.rows = tuple(rows)
        self.kind = rows[0].sparse.kind
        self.device = rows[0].out.device
        self.lams = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
        self.launch = launch or LAUNCHES[self.kind]
        sparse = [row.sparse for row in rows]
        self.constants = constants(
            self.kind,
            rows[0].out.dtype,
            sparse[0].base.dtype,
            sparse[0].target.dtype,
            rows[0].via,
            self.launch,
        )
        operands = (
            [row.out for row in rows],
            [entry.where for entry in sparse],
            [entry.starts for entry in sparse],
            [entry.base for entry in sparse],
            [entry.target for entry in sparse],
        )
        # where nothing is listed there is nothing to launch
        sizes = [entry.numel if entry.count else 0 for entry in sparse]
        self.tiles = tiles.build(operands, sizes, TILE[self.kind])
        self.counts = torch.tensor([entry.count for entry in sparse], dtype=torch.int64).to(
            self.device
        )

    def launch_(self) -> None:
        """Set the positions for the λ in `lams`. Touches device memory only, so a CUDA graph can
        record it."""
        if self.tiles.count == 0:
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            tables = (*self.tiles.pointers, self.lams)
            kernel, arguments = (
                (index_kernel, (self.counts, *tables))
                if self.kind == "index"
                else (bitmap_kernel, tables)
            )
            kernel[(self.tiles.count,)](
                self.tiles.words,
                *arguments,
                **self.constants,
                num_warps=self.launch.num_warps(),
                **OPTIONS,
            )

"""Word sums of many tensors as one Triton launch per device."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import tiles
from pa_kernels.reference import CHUNK_WORDS
from pa_kernels.tiles import OPTIONS, Launch, Tiles

LAUNCH = Launch(block=1024, threads=128)
"""In 64-bit words; `block` divides the chunk. Not yet timed on a GPU; the bench sweeps
CANDIDATES."""

CANDIDATES = tuple(Launch(block, threads) for block in (1024, 2048, 4096) for threads in (128, 256))


@triton.jit
def mix(x):
    """`reference.mix` of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def odd_low(column):
    return ((mix(column.to(tl.uint32)).to(tl.uint64) << 1) | 1).to(tl.int64)


@triton.jit
def odd_high(chunk):
    x = chunk.to(tl.uint32)
    return ((mix(x ^ 0x5BD1E995).to(tl.uint64) << 32) | mix(x ^ 0x9E3779B9).to(tl.uint64) | 1).to(
        tl.int64
    )


@triton.jit
def checksum_kernel(
    words,
    sizes,
    pointers,
    sums,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    first = ((word & 0xFFFFFFFF) >> 1) * BLOCK
    column = first % CHUNK
    pointer = tl.load(pointers + t)
    if word & 1:
        offsets = tl.multiple_of(first, BLOCK) + tl.arange(0, BLOCK)
        data = tl.load(tl.multiple_of(pointer.to(tl.pointer_type(tl.int64)), 16) + offsets)
        total = tl.sum(data * odd_low(column + tl.arange(0, BLOCK)), 0)
    else:
        size = tl.load(sizes + t)
        byte_ptr = pointer.to(tl.pointer_type(tl.uint8))
        parts = tl.zeros((TAIL,), tl.int64)
        offset = first
        end = tl.minimum((size + 7) // 8, first + BLOCK)
        while offset < end:
            offsets = offset + tl.arange(0, TAIL)
            data = tl.zeros((TAIL,), tl.int64)
            for k in tl.static_range(8):
                mask = (offsets * 8 + k < size) & (offsets < end)
                byte = tl.load(byte_ptr + offsets * 8 + k, mask=mask, other=0)
                data |= byte.to(tl.int64) << (8 * k)
            parts += data * odd_low(offsets % CHUNK)
            offset += TAIL
        total = tl.sum(parts, 0)
    tl.atomic_add(sums + t, total * odd_high(first // CHUNK), sem="relaxed")


def constants(launch: Launch) -> dict[str, int]:
    """The constexpr arguments of `checksum_kernel`."""
    return {"CHUNK": CHUNK_WORDS, "BLOCK": launch.block, "TAIL": launch.threads}


def sums(flat: Sequence[Tensor], launch: Launch = LAUNCH) -> list[int]:
    """Sums, mod 2⁶⁴ and signed, of byte tensors that are all on one device."""
    table = tiles.build([flat], [data.numel() for data in flat], 8 * launch.block)
    totals = torch.zeros(len(flat), dtype=torch.int64, device=flat[0].device)
    add_(totals, table, launch)
    return totals.tolist()


def add_(totals: Tensor, table: Tiles, launch: Launch = LAUNCH) -> None:
    """Add to each of `totals`, int64 [T], the sum of its tensor; tables of tiles of 8 ·
    `launch.block` bytes, one operand."""
    tables = table.words, table.sizes, table.pointers, totals
    launch.start(
        checksum_kernel, table.count, totals.device, *tables, **constants(launch), **OPTIONS
    )

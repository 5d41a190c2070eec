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
from pa_kernels.reference import CHECKSUM_VERSION, CHUNK_WORDS
from pa_kernels.reference import FOLD as FOLDS
from pa_kernels.tiles import OPTIONS, Launch

LAUNCH = Launch(block=4096, threads=256)
"""In 64-bit words; `block` divides the chunk. One atomic add for 32 KiB: neighbours in the grid add
to one address. Not yet timed on a GPU; the bench sweeps CANDIDATES."""

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


FOLD = tl.constexpr(FOLDS[CHECKSUM_VERSION])


@triton.jit
def fold(words, FACTOR: tl.constexpr = FOLD):
    """`reference.folded` of int64; of an element in its place, what it adds to its word's."""
    return words + (words >> 32) * FACTOR


@triton.jit
def checksum_kernel(
    words,
    sizes,
    pointers,
    sums,
    FACTOR: tl.constexpr,
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
        total = tl.sum(fold(data, FACTOR) * odd_low(column + tl.arange(0, BLOCK)), 0)
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
            parts += fold(data, FACTOR) * odd_low(offsets % CHUNK)
            offset += TAIL
        total = tl.sum(parts, 0)
    tl.atomic_add(sums + t, total * odd_high(first // CHUNK), sem="relaxed")


def constants(launch: Launch, version: int = CHECKSUM_VERSION) -> dict[str, int]:
    """The constexpr arguments of `checksum_kernel`."""
    return {
        "FACTOR": FOLDS[version],
        "CHUNK": CHUNK_WORDS,
        "BLOCK": launch.block,
        "TAIL": launch.threads,
    }


class ChecksumTritonGroup:
    """T byte tensors that are all on one device, with the tables of their tiles, to be summed as
    often as asked for.

    Attributes:
        totals: int64 [T] on the device, of the last launch.
    """

    def __init__(
        self,
        flat: Sequence[Tensor],
        version: int = CHECKSUM_VERSION,
        launch: Launch = LAUNCH,
    ):
        self.launch, self.constants = launch, constants(launch, version)
        self.tiles = tiles.build([flat], [data.numel() for data in flat], 8 * launch.block)
        self.totals = torch.zeros(len(flat), dtype=torch.int64, device=flat[0].device)

    def launch_(self) -> None:
        """Sum anew into `totals`. Touches device memory only."""
        self.totals.zero_()
        self.launch.start(
            checksum_kernel,
            self.tiles.count,
            self.totals.device,
            self.tiles.words,
            self.tiles.sizes,
            self.tiles.pointers,
            self.totals,
            **self.constants,
            **OPTIONS,
        )

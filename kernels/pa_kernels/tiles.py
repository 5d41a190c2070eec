"""Many tensors, one launch: the tables by which a program finds its tile, its tensor and its
pointers.

A grid of programs covers every tensor of a group. Program p reads one word of the tile table,

    word = tensor << 32 | tile << 1 | full

and from it the tensor's row in the pointer tables and the tile's offset tile · BLOCK, in 64 bits.
`full` promises that the tile lies wholly inside a tensor all of whose pointers are 16-byte aligned,
so that the kernel may give the compiler the hints which keep accesses 128 bits wide. A false hint
is a misaligned-address fault; every other tile takes a masked loop without hints. A caller can
withhold the promise from tensors that need the loop's care.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernel bodies in Python on CPU tensors; Triton reads it when a kernel is
defined, so it is fixed here."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: elements and threads per program."""

    block: int
    threads: int

    def num_warps(self, warp_size: int | None = None) -> int:
        """Warps per program: of `warp_size` threads, or of as many as this machine's GPU has."""
        return self.threads // (warp_size or (64 if torch.version.hip else 32))


@dataclass(frozen=True)
class Tiles:
    """Device tables of one launch over T tensors.

    Attributes:
        words: int64 [number of tiles], the tile table.
        sizes: int64 [T], size of each tensor in the kernel's own unit.
        pointers: int64 [operands, T], address of each tensor of each operand.
    """

    words: Tensor
    sizes: Tensor
    pointers: Tensor

    @property
    def count(self) -> int:
        return self.words.numel()


def build(
    operands: Sequence[Sequence[Tensor]],
    sizes: Sequence[int],
    block: int,
    allowed: Sequence[bool] | None = None,
) -> Tiles:
    """Tables for tensors `operands[o][t]` of size `sizes[t]`, cut into tiles of `block`, in one
    unit.

    `allowed[t]` says whether tiles of tensor t may be called full; all may, by default.

    Tensors with 0 elements have no tile. All tensors are on one device, where the tables are made.

    Cost: 8 bytes per tile and 8·(operands + 1) bytes per tensor on the device.
    """
    device = operands[0][0].device
    pointers = torch.tensor(
        [[tensor.data_ptr() for tensor in operand] for operand in operands],
        dtype=torch.int64,
        device="cpu",
    )
    numels = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    tiles = (numels + block - 1) // block
    aligned = (pointers % ALIGNMENT_BYTES == 0).all(dim=0)
    if allowed is not None:
        aligned &= torch.tensor(allowed, dtype=torch.bool, device="cpu")
    # made on the device: a checksum of 8 G weights has 2 M tiles, whose table takes a CPU 60 times
    # as long as the sum itself
    count = int(tiles.sum())
    full, numels, tiles = (table.to(device) for table in (aligned, numels, tiles))
    owner = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), tiles, output_size=count
    )
    tile = torch.arange(count, device=device) - (torch.cumsum(tiles, 0) - tiles)[owner]
    full = full[owner] & ((tile + 1) * block <= numels[owner])
    return Tiles((owner << 32) | (tile << 1) | full.long(), numels, pointers.to(device))

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
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernel bodies in Python on CPU tensors; Triton reads it when a kernel is
defined, so it is fixed here."""


def is_on_cpu(tensor: Tensor) -> bool:
    """Return whether torch does the work on `tensor`: it is on the CPU, and no kernel is
    interpreted there."""
    return tensor.device.type == "cpu" and not INTERPRETED


OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
"""Fusion is off because its default may change: every fma of the contract is written out."""


@dataclass(frozen=True)
class Launch:
    """The cut of a kernel: elements and threads per program."""

    block: int
    threads: int

    def num_warps(self, warp_size: int | None = None) -> int:
        """Warps per program: of `warp_size` threads, or of as many as this machine's GPU has."""
        return self.threads // (warp_size or (64 if torch.version.hip else 32))

    def start(
        self, kernel: Any, programs: int, device: torch.device, *tables: Any, **constants: Any
    ) -> None:
        """Launch `programs` programs of `kernel`, which may be none; its compiler options are among
        `constants`. Touches device memory only, so a CUDA graph can record it."""
        if programs:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                kernel[(programs,)](*tables, num_warps=self.num_warps(), **constants)


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
    pointers = table([[tensor.data_ptr() for tensor in operand] for operand in operands])
    numels = table(sizes)
    tiles = (numels + block - 1) // block
    aligned = (pointers % ALIGNMENT_BYTES == 0).all(dim=0)
    if allowed is not None:
        aligned &= torch.tensor(allowed, dtype=torch.bool, device="cpu")
    # made on the device: a checksum of 8 G weights has 2 M tiles, whose table takes a CPU 60 times
    # as long as the sum itself
    count = int(tiles.sum())
    full, numels, tiles = (column.to(device) for column in (aligned, numels, tiles))
    owner = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), tiles, output_size=count
    )
    tile = torch.arange(count, device=device) - (torch.cumsum(tiles, 0) - tiles)[owner]
    full = full[owner] & ((tile + 1) * block <= numels[owner])
    return Tiles((owner << 32) | (tile << 1) | full.long(), numels, pointers.to(device))


def table(values: Sequence[Any], device: torch.device | str = "cpu") -> Tensor:
    """Return `values` as an int64 tensor on `device`."""
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)


@dataclass(frozen=True)
class RowBlocks:
    """The E·M rows of a stack of E matrices [M, N], cut into blocks of `step` rows, of which none
    spans two matrices."""

    matrices: int
    height: int
    step: int

    @property
    def per_matrix(self) -> int:
        return -(-self.height // self.step)

    @property
    def all(self) -> range:
        return range(self.matrices * self.per_matrix)

    def block(self, k: int) -> tuple[int, slice]:
        """Block k: which matrix, and its rows there."""
        e, down = divmod(k, self.per_matrix)
        return e, slice(down * self.step, min((down + 1) * self.step, self.height))

    def covering(self, rows: slice) -> range:
        """The blocks that hold these of the E·M rows."""
        if rows.start == rows.stop:
            return range(0)
        first, last = (
            row // self.height * self.per_matrix + row % self.height // self.step
            for row in (rows.start, rows.stop - 1)
        )
        return range(first, last + 1)

    def rows(self, blocks: range) -> slice:
        """The E·M rows in these neighbouring blocks."""
        if not blocks:
            return slice(0, 0)
        (first, head), (last, tail) = self.block(blocks[0]), self.block(blocks[-1])
        return slice(first * self.height + head.start, last * self.height + tail.stop)

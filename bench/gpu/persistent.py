"""A dense lerp whose programs stay: each takes tile after tile, so that their number says how many
bytes are in flight.

Not shipped: a candidate that a GPU has to decide about, and the one way to ask host memory for less
at a time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from pa_kernels import dense_triton
from pa_kernels.dense_triton import dense_kernel
from pa_kernels.tiles import OPTIONS


@triton.jit
def persistent_kernel(
    words,
    count,
    sizes,
    outs,
    bases,
    insts,
    lams,
    draws,
    sums,
    moveds,
    distances,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    RECORDS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid
    while tile < count:
        # the kernel takes the word of its own program: so begin the table where that is this tile's
        dense_kernel(
            words + (tile - pid),
            sizes,
            outs,
            bases,
            insts,
            lams,
            draws,
            sums,
            moveds,
            distances,
            OUT,
            BASE,
            INST,
            INTERMEDIATE,
            IS_STOCHASTIC,
            RECORDS,
            ASM,
            BLOCK,
            TAIL,
        )
        tile += tl.num_programs(0)


class PersistentGroup(dense_triton.DenseTritonGroup):
    """Tensors of one dtype, rewritten by `programs` programs."""

    def __init__(self, *arguments: Any, programs: int, **options: Any):
        super().__init__(*arguments, **options)
        self.programs = min(programs, self.tiles.count)

    def launch_(self) -> None:
        with (
            torch.cuda.device(self.device) if self.device.type == "cuda" else torch.inference_mode()
        ):
            persistent_kernel[(self.programs,)](
                self.tiles.words,
                self.tiles.count,
                self.tiles.sizes,
                *self.tiles.pointers,
                *self.tables,
                **self.constants,
                num_warps=self.launch.num_warps(),
                **OPTIONS,
            )

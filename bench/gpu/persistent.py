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
from pa_kernels import lerp_triton
from pa_kernels.lerp_triton import OPTIONS, lerp_tile


@triton.jit
def persistent_kernel(
    words,
    count,
    sizes,
    outs,
    bases,
    insts,
    lams,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    VIA: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    at = tl.program_id(0)
    while at < count:
        lerp_tile(
            tl.load(words + at),
            sizes,
            outs,
            bases,
            insts,
            lams,
            OUT,
            BASE,
            INST,
            VIA,
            BLOCK,
            TAIL,
            INTERPRET,
        )
        at += tl.num_programs(0)


class Group(lerp_triton.Group):
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
                self.lams,
                **self.constants,
                num_warps=self.launch.num_warps(),
                **OPTIONS,
            )

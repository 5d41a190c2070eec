"""Σ (w − b)(d − b) of CPU tensors: how far weights have moved along the line from base to a delta's
endpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pa_kernels import compiled
from pa_kernels.cores import Scratch, inference, pieces

BLOCK, BLOCKS = 1024, 16
"""Products are summed by their places in a block, over so many blocks; `compiled_loops` has the
same."""

_IN_CACHE = 1 << 17
"""Elements at a time: fewer cost more in calls than they gain in a core's L2."""

_scratch = Scratch()


def projection(live: Tensor, base: Tensor, end: Tensor, before: float = 0.0) -> float:
    """Return `before` + Σ (live − base)(end − base) over flat CPU tensors of one length, on one
    core.

    Args:
        live, base, end: contiguous; bf16, fp16 or fp32, in any mix.
        before: the sum of what comes before in a longer tensor, where the bits of its sum are
            asked for; a whole number of BLOCKS blocks then.

    Numerics: differences and products in fp32, summed by their places in 1024 elements over 16
        such blocks, these sums in a tree, and its 16 last in fp64: the same bits on every machine,
        with numba and without.
    Cost: one read of each tensor; scratch of 2 MB.
    """
    sides = live.detach(), base.detach(), end.detach()
    loops = compiled.ready()
    if loops is not None and all(side.dtype == torch.bfloat16 for side in sides):
        return loops.products(*(side.view(torch.int16).numpy() for side in sides), before)
    total = before
    with inference():
        for piece in pieces(live.numel(), _IN_CACHE):
            count = piece.stop - piece.start
            whole = -(-count // (BLOCK * BLOCKS)) * BLOCK * BLOCKS
            w, b, d = (
                _scratch.take(use, count, torch.float32).copy_(side[piece])
                for use, side in zip(("live", "base", "end"), sides)
            )
            terms = _scratch.take("terms", whole, torch.float32)
            terms[count:] = 0
            torch.mul(w.sub_(b), d.sub_(b), out=terms[:count])
            # one after another: numpy's own sums go in pairs
            total = float(np.cumsum([total, *_group_sums(terms).tolist()])[-1])
    return total


def _group_sums(terms: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the sum of every BLOCKS blocks of `terms`, which is written over."""
    blocks = terms.view(-1, BLOCKS, BLOCK)
    rows = blocks[:, 0]
    for k in range(1, BLOCKS):
        rows.add_(blocks[:, k])
    width = BLOCK // 2
    while width >= 16:
        rows = rows[:, :width].add_(rows[:, width : 2 * width])
        width //= 2
    sums: np.ndarray[Any, np.dtype[np.float64]] = np.cumsum(rows.double().numpy(), axis=1)[:, -1]
    return sums

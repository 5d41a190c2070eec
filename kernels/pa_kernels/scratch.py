"""Memory for pieces of work, one set per thread, kept from piece to piece: fresh memory costs more
to touch than to use."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Memory of a CPU by use (`base`, `out`, …). What `take` returns is overwritten by the thread's
    next `take` for that use.

    Cost: the largest piece of each use, per thread.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for `count` elements of `dtype` [count], its contents undefined; no inference
        tensor, whatever the mode."""
        size = count * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.nbytes < size:
            with torch.inference_mode(False):
                held = self._held[use] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return held[:size].view(dtype)

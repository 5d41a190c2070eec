"""Memory for chunks, one set per thread, kept from chunk to chunk: the kernel clears fresh memory page by page."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Scratch(threading.local):
    """Memory by use (`base`, `out`, …). What `take` returns is overwritten by the thread's next `take` for that use.

    Cost: the largest chunk of each use, per thread.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for `count` elements of `dtype` [count], its contents undefined."""
        import torch

        size = count * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.nbytes < size:
            held = self._held[use] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype)

"""fp32 matrix products in full precision, whatever the process allows: torch may be told to cut
factors to 11 or 8 bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# since torch 2.9 each backend has its own say; before, one word of another meaning speaks for all
_CPU = getattr(torch.backends.mkldnn, "matmul", None)
_CUDA: Any = torch.backends.cuda.matmul
_FULL = "highest" if _CPU is None else "ieee"

_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it fp32 factors keep their 24 bits, on the CPU and on GPUs, for every thread of the
    process.

    What was allowed before is allowed again when the last thread has left.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _before[:] = _allowed()
            _allow([_FULL] * len(_before))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _allow(_before)


def _allowed() -> list[str]:
    return (
        [torch.get_float32_matmul_precision()]
        if _CPU is None
        else [_CPU.fp32_precision, _CUDA.fp32_precision]
    )


def _allow(precision: list[str]) -> None:
    if _CPU is None:
        torch.set_float32_matmul_precision(precision[0])
    else:
        _CPU.fp32_precision, _CUDA.fp32_precision = precision

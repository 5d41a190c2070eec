"""Seconds that a piece of work takes: by events on a GPU, by the wall elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Work = Callable[[], object]
Clock = Callable[[Work], float]


def clock_of(device: torch.device) -> Clock:
    """The clock for work on `device`."""
    return event_seconds if device.type == "cuda" else wall_seconds


def event_seconds(work: Work) -> float:
    """Between two events on the stream that the work is sent to: gaps that the host leaves
    count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def wall_seconds(work: Work) -> float:
    """From an idle device to an idle device, as a caller sees it."""
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def settle() -> None:
    """Wait until the GPU, if there is one, has nothing to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

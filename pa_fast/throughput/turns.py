"""Ways to do something, timed in turn: what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each over `rounds` rounds after one to warm up, from an idle device to
    an idle device."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            wait()
            began = time.perf_counter()
            way()
            wait()
            if round_:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def wait() -> None:
    """Until every GPU in use has nothing to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

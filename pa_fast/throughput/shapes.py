"""The shapes of a model, and as many of them as fit the memory that is free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from pa_fast.errors import UsageError
from pa_fast.live.memory import FreeMemory

SHAPES = {
    "1b": (2048, 5632, 18, 32000, 512),
    "8b": (4096, 14336, 32, 128256, 1024),
    "70b": (8192, 28672, 80, 128256, 1024),
}
"""Llama's hidden size, intermediate size, layers, vocabulary, and width of keys and values."""

_KEPT_BYTES = 10
"""Per weight: live, base, instruct, and codes or scratch beside them."""

_UNKNOWN_BYTES = 16 * 2**30
"""Taken to be free where the system does not say."""

Shape = tuple[int, ...]


def shapes(name: str) -> list[Shape]:
    """Shapes of every tensor of a model of that name, or of a checkpoint folder.

    Raises:
        UsageError: neither is there.
    """
    if name not in SHAPES:
        if not Path(name).is_dir():
            raise UsageError(
                f"shape `{name}` is not known", f"write {', '.join(SHAPES)}, or a checkpoint folder"
            )
        from pa_fast.checkpoint.reader import Checkpoint

        with Checkpoint.open(name) as checkpoint:
            return [tuple(info.shape) for info in checkpoint.tensors.values() if info.count]
    hidden, intermediate, layers, vocabulary, keys = SHAPES[name]
    layer: list[Shape] = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
        (hidden,),
        (hidden,),
    ]
    return [*layer * layers, (vocabulary, hidden), (vocabulary, hidden), (hidden,)]


def fitting(wanted: Sequence[Shape], where: torch.device) -> list[Shape]:
    """Return as many of `wanted`, from the first on, as fit the free memory of `where`.

    Raises:
        UsageError: none fits.
    """
    memory = FreeMemory.of(where)
    free = _UNKNOWN_BYTES if memory is None else memory.free_bytes
    weights_left, kept = int(free * 0.8) // _KEPT_BYTES, []
    for shape in wanted:
        if math.prod(shape) <= weights_left:
            kept.append(shape)
            weights_left -= math.prod(shape)
    if not kept:
        raise UsageError(
            "no tensor of these shapes fits the memory that is free", "choose a smaller --shape"
        )
    return kept

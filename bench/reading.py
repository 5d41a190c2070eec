"""Reading checkpoints once into memory: the floor of what loads, encodes or merges them."""

from __future__ import annotations

import torch
from pa_kernels.cores import over_cores

from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.checkpoint.streaming import cuts


def read_into_memory(*sides: Checkpoint) -> None:
    """Every tensor of `sides`, over all cores, by the reader that merges use."""
    for side in sides:
        held = {
            name: torch.empty(info.count, dtype=torch_dtype(info.dtype))
            for name, info in side.tensors.items()
        }
        pieces = [(name, *cut) for name, info in side.tensors.items() for cut in cuts(info.count)]
        over_cores(
            lambda at, side=side, held=held: side.chunk(*at, held[at[0]][at[1] : at[2]]), pieces
        )  # type: ignore[misc]


def weights(*sides: Checkpoint) -> int:
    return sum(info.count for side in sides for info in side.tensors.values())

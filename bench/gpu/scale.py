"""How large everything is: sizes that fill a GPU, and sizes that the interpreter walks through in
seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pa_fast.throughput.shapes import Shape, shapes


@dataclass(frozen=True)
class Scale:
    """Sizes of all stages, in weights unless they say otherwise.

    Attributes:
        layer, outside, layers: shapes of a model's layer, of what is outside its layers, and how
            many layers there are.
        packed: of each of the tensors of a packed pair. sparse: the same, of a sparse one.
        matrices: shapes of a low-rank pair. ranks: of its factors.
        host: whose sources lie in pinned host memory. small: of a switch whose launch costs more
            than its bytes.
        chunk: weights that a staged copy from the host moves at a time.
        hidden, intermediate, vocabulary, heads, key_heads, tokens, batches: of the model that is
            swept; tokens of a batch.
        lambdas: what a sweep visits.
        lams: the two λ that switches go between; of the interpreter such that its products are
            exact.
    """

    layer: tuple[Shape, ...]
    outside: tuple[Shape, ...]
    layers: int
    packed: tuple[int, ...]
    sparse: tuple[int, ...]
    matrices: tuple[Shape, ...]
    ranks: tuple[int, ...]
    host: int
    chunk: int
    small: tuple[int, ...]
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_heads: int
    tokens: tuple[int, int]
    batches: int
    lambdas: str
    lams: tuple[float, float]

    def sizes(self, layers: int) -> list[int]:
        """Elements of every tensor of a model with so many layers."""
        return [math.prod(shape) for shape in [*self.layer * layers, *self.outside]]

    def layers_for(self, room_bytes: int, bytes_per_weight: float) -> int:
        """As many layers as fit, all of them at most; 0 where not one does."""
        fixed, each = sum(self.sizes(0)), sum(self.sizes(1)) - sum(self.sizes(0))
        return max(min(self.layers, (int(room_bytes / bytes_per_weight) - fixed) // each), 0)


_8B = shapes("8b")

FULL = Scale(
    layer=tuple(_8B[:9]),
    outside=tuple(_8B[-3:]),
    layers=32,
    packed=(1 << 26,) * 32,
    sparse=(1 << 26,) * 32,
    matrices=((4096, 14336),) * 24,
    ranks=(16, 64, 256),
    host=1 << 28,
    chunk=1 << 24,
    small=(1 << 16,) * 16,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    heads=32,
    key_heads=8,
    tokens=(8, 2048),
    batches=10,
    lambdas="0:1:0.1",
    lams=(0.3, 0.7),
)
"""Llama-3.1-8B's shapes, 8.03 G weights; 2.1 G for packed and sparse, 1.4 G for low rank: all of
them many times any cache."""

TINY = Scale(
    layer=((64, 48), (33, 100)),
    outside=((5000,),),
    layers=1,
    packed=(33_000,),
    sparse=(70_001,),
    matrices=((130, 144), (70, 70)),
    ranks=(20,),
    host=9_001,
    chunk=4_096,
    small=(500, 2_100),
    hidden=32,
    intermediate=48,
    vocabulary=64,
    heads=4,
    key_heads=2,
    tokens=(2, 16),
    batches=2,
    lambdas="1",
    lams=(0.25, 0.75),
)


def free_bytes(device: torch.device) -> int:
    """Device memory that may be taken; without a GPU as much as a rehearsal needs."""
    return int(torch.cuda.mem_get_info(device)[0] * 0.9) if device.type == "cuda" else 1 << 30

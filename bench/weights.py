"""Weights of a 1B model's shapes in one flat piece for each side, cut into tensors: what the ops
are timed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pa_fast.throughput.harness import format_large

LAYER = [
    (2048, 2048),
    (512, 2048),
    (512, 2048),
    (2048, 2048),
    (5504, 2048),
    (5504, 2048),
    (2048, 5504),
    (2048,),
    (2048,),
]
"""44 M weights; ten layers move 2.7 GB in a bf16 switch."""


@dataclass(frozen=True)
class Weights:
    """Base and instruct of `layers` layers, flat, and the sizes of their tensors."""

    sizes: list[int]
    base: torch.Tensor
    instruct: torch.Tensor

    @classmethod
    def drawn(cls, layers: int, dtype: str) -> Weights:
        sizes = [torch.Size(shape).numel() for shape in LAYER] * layers
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(sum(sizes), generator=generator).mul_(0.02)
        step = torch.randn(sum(sizes), generator=generator).mul_(0.0004)
        return cls(sizes, base.to(getattr(torch, dtype)), step.add_(base).to(getattr(torch, dtype)))

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of the tensors that lie in `flat`."""
        return list(flat.split(self.sizes))

    def __str__(self) -> str:
        dtype = str(self.base.dtype).removeprefix("torch.")
        count = format_large(self.base.numel())
        return f"{count} {dtype} weights, {len(self.sizes)} tensors"

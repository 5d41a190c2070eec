"""A model's worth of tensors that lie between two others: flat memory, and the views that are its
tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pa_kernels import reference
from pa_kernels.reference import Draw
from torch import Tensor

from pa_fast.throughput.harness import check_bits, format_large

if TYPE_CHECKING:
    from bench.gpu.run import GpuRun

LAYER = (
    (2048, 2048),
    (512, 2048),
    (512, 2048),
    (2048, 2048),
    (5504, 2048),
    (5504, 2048),
    (2048, 5504),
    (2048,),
    (2048,),
)
"""Of a 1B model, 44 M weights; ten layers move 2.7 GB in a bf16 switch."""


@dataclass(frozen=True)
class FlatPair:
    """Live, base and instruct as flat tensors `w`, `b`, `i`, and cut into `out`, `base`, `inst`."""

    w: Tensor
    b: Tensor
    i: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def drawn(cls, layers: int, dtype: str) -> FlatPair:
        """So many LAYERs on the CPU, a step of 2 % apart, the same ones every time."""
        sizes = tuple(torch.Size(shape).numel() for shape in LAYER * layers)
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(sum(sizes), generator=generator).mul_(0.02)
        step = torch.randn(sum(sizes), generator=generator).mul_(0.0004)
        b, i = (side.to(getattr(torch, dtype)) for side in (base, step.add_(base)))
        return cls(torch.zeros_like(b), b, i, sizes)

    @classmethod
    def random(cls, run: GpuRun, sizes: list[int], relative: float | None = None) -> FlatPair:
        """Normal weights: two sets that have nothing to do with each other, or a step of `relative`
        apart."""
        b = run.random(sum(sizes))
        i = run.random(sum(sizes)) if relative is None else run.near(b, relative)
        return cls(torch.empty_like(b), b, i, tuple(sizes))

    def __str__(self) -> str:
        dtype = str(self.b.dtype).removeprefix("torch.")
        return f"{format_large(self.count)} {dtype} weights, {len(self.sizes)} tensors"

    @property
    def count(self) -> int:
        return self.w.numel()

    @property
    def nbytes(self) -> int:
        """Of one side."""
        return self.w.nbytes

    @property
    def out(self) -> list[Tensor]:
        return list(self.w.split(self.sizes))

    @property
    def base(self) -> list[Tensor]:
        return list(self.b.split(self.sizes))

    @property
    def inst(self) -> list[Tensor]:
        return list(self.i.split(self.sizes))

    def poison(self) -> None:
        """Fill the live tensors with what no switch writes."""
        self.w.fill_(9)

    def check(
        self,
        what: str,
        lam: float,
        draws: list[Draw] | None = None,
        out: list[Tensor] | None = None,
    ) -> None:
        """Raise WrongBits unless the live tensors, by default `self.out`, are W(λ) wherever one
        looks."""
        base, inst = self.base, self.inst

        def expected(t: int, span: slice) -> Tensor:
            draw = Draw(draws[t].key, draws[t].start + span.start) if draws else None
            return reference.lerp(base[t][span].cpu(), inst[t][span].cpu(), lam, draw=draw)

        check_bits(what, self.out if out is None else out, expected)

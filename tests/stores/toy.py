"""A store of one's own: one class, and one line in the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pa_kernels
import torch
from torch import Tensor

from pa_fast.checkpoint.safetensors import TensorInfo
from pa_fast.stores.store import (
    DenseEntry,
    Entry,
    PartRule,
    Source,
    Store,
    TensorDescription,
    TensorSize,
)


@dataclass(frozen=True, eq=False)
class Steps:
    """How far apart the bit patterns of base and instruct are: int16, in the live shape."""

    steps: Tensor


@dataclass
class ToyStore(Store):
    """Steps for tensors of bf16 on both sides; all others whole."""

    name = "toy"
    entry = Steps
    kinds, part_names = ("steps",), ("steps",)
    reads_base = True

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        for source in sources:
            base, instruct = source.on_device()
            if {base.dtype, instruct.dtype} == {torch.bfloat16}:
                yield Steps(instruct.view(torch.int16) - base.view(torch.int16))
            else:
                yield DenseEntry(instruct)

    def estimate(self, sizes: Sequence[TensorSize]) -> int:
        return sum(size.beside_bytes for size in sizes) // 2

    def set_(self, lam: float | Sequence[float]) -> None:
        lams = lam if isinstance(lam, Sequence) else [lam] * len(self.live)
        for k, live in enumerate(self.live):
            live.copy_(self.merged(k, slice(0, live.numel()), lams[k]).view(live.shape))

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        base, target = self.endpoints(k, span)
        out = torch.empty(base.shape, dtype=self.live[k].dtype, device=base.device)
        pa_kernels.lerp_(
            [out], [base], [target], lam, intermediate_dtypes=[self.intermediate_dtypes[k]]
        )
        return out

    def endpoints(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        base = self.base[k].view(-1)[span]
        steps = self.entries[k].steps.view(-1)[span]
        return base, (base.view(torch.int16) + steps).view(base.dtype)

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[PartRule]:
        info = infos["steps"]
        fits = info.dtype == "I16" and info.shape == tensor.shape
        yield "steps", fits, f"I16 {list(tensor.shape)}"

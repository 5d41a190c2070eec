"""The dense store: both sides stay beside the live copy, and every λ is computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pa_kernels
import torch
from pa_kernels.dense import merged
from pa_kernels.reference import Draw
from pa_kernels.switch import Written
from torch import Tensor

from pa_fast.checkpoint.safetensors import TensorInfo
from pa_fast.stores.store import (
    DenseEntry,
    PartRule,
    Source,
    Store,
    TensorDescription,
    TensorSize,
    floats,
    shaped,
)


@dataclass
class DenseStore(Store):
    """Every tensor in full.

    Numerics: the contract, `pa_kernels.reference.lerp`.
    Cost: |base| + |instruct| bytes per weight beside the live copy, 4 beside 2 in bf16; a switch
        moves 6.
    """

    name = "dense"
    entry = DenseEntry
    kinds, part_names = ("whole",), ("target",)
    reads_base = keeps_sources = stochastic = True

    def encode(self, sources: Sequence[Source]) -> Iterator[DenseEntry]:
        """Yield instruct as it is, copied only to reach the live tensor's device."""
        for source in sources:
            yield DenseEntry(source.instruct.to(source.device))

    def estimate(self, sizes: Sequence[TensorSize]) -> int:
        """Return the bytes of both sides."""
        return sum(size.beside_bytes for size in sizes)

    def prepare(self) -> None:
        targets = [entry.target for entry in self.entries]
        self._lerp = pa_kernels.Lerp(
            self.live, self.base, targets, self.intermediate_dtypes, self.draws, records=True
        )

    def set_(self, lam: float | Sequence[float]) -> None:
        self._lerp.run_(lam)

    def written(self) -> Sequence[Written]:
        return self._lerp.written()

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        if self.draws[k] is None:
            dtypes = self.live[k].dtype, self.intermediate_dtypes[k]
            return merged(*self.endpoints(k, span), lam, *dtypes)
        live = self.live[k]
        out = torch.empty(span.stop - span.start, dtype=live.dtype, device=live.device)
        self._merge_(out, k, span, lam)
        return out

    def merged_together(
        self, pieces: Sequence[tuple[int, slice]], lams: Sequence[float]
    ) -> list[Tensor]:
        """Merge pieces of one kind as one: of many small tensors each would cost several calls."""
        kinds = {
            (
                lam,
                *(t.dtype for t in (self.live[k], self.base[k], self.entries[k].target)),
                self.intermediate_dtypes[k],
                self.draws[k] is None,
            )
            for (k, _), lam in zip(pieces, lams)
        }
        if len(pieces) < 2 or len(kinds) > 1 or self.draws[pieces[0][0]] is not None:
            return super().merged_together(pieces, lams)
        sides = zip(*(self.endpoints(k, span) for k, span in pieces))
        base, target = (torch.cat(side) for side in sides)
        first = pieces[0][0]
        dtypes = self.live[first].dtype, self.intermediate_dtypes[first]
        whole = merged(base, target, lams[0], *dtypes)
        return list(whole.split([span.stop - span.start for _, span in pieces]))

    def write_(self, k: int, span: slice, lam: float) -> None:
        self._merge_(self.live[k].detach().view(-1)[span], k, span, lam)

    def _merge_(self, out: Tensor, k: int, span: slice, lam: float) -> None:
        base, target = ([side] for side in self.endpoints(k, span))
        draw = self.draws[k]
        shifted = draw and Draw(draw.key, draw.start + span.start)
        pa_kernels.lerp_(
            [out],
            base,
            target,
            lam,
            intermediate_dtypes=[self.intermediate_dtypes[k]],
            draws=[shifted],
        )

    def endpoints(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Return slices of the two sides, in their own dtypes; see `Store.endpoints`."""
        device = self.live[k].device
        base, target = self.base[k].view(-1)[span], self.entries[k].target.view(-1)[span]
        return base.to(device), target.to(device)

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[PartRule]:
        yield from floats(infos, "target")
        yield shaped(infos, "target", tensor.shape)

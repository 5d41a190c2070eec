"""The low-rank store, merged: W(λ) = B + λ·UV, written from the base and two thin factors per
matrix.

Cost: the base, 2 bytes per bf16 weight, and R·(M + N) values; a switch moves 4 bytes per weight and
computes 2R operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pa_kernels import lowrank as merging
from torch import Tensor

from pa_fast.delta import dense
from pa_fast.delta.entry import Factors


class LowRank:
    """T live matrices, or stacks of them, that are written from their base and the factors of their
    delta.

    Args:
        live, base: T contiguous tensors each, of the same shapes; a base that is elsewhere is
            copied to its live tensor's device.
        entries: where the live tensors are.
        via: for each entry the dtype that a merge is rounded to before it is stored, or None for
            the live dtype.

    Numerics: `pa_kernels.reference.lowrank`, UV summed in fp32: one order, and so one result, per
    device. It is within
        |λ|·(R + 1)·2⁻²³·Σ|u·v| and one ulp of B + λ·UV; see `pa_kernels.LowRank`.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        base: Sequence[Tensor],
        entries: Sequence[Factors],
        via: Sequence[torch.dtype | None],
    ):
        self._live, self._entries = list(live), list(entries)
        self.base = [b.to(w.device) for w, b in zip(live, base)]
        self._merge = merging.LowRank(
            self._live, self.base, [e.u for e in entries], [e.v for e in entries], via
        )

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ) into every live tensor."""
        self._merge.run_(lam)

    def restore_(self) -> None:
        """Write what `set_` leaves alone: nothing."""

    def spans(self, k: int) -> Iterator[slice]:
        """Pieces of entry k, as slices of its flat elements: whole rows, and as far as it goes
        whole tiles of them."""
        live = self._live[k]
        width = max(live.shape[-1], 1)
        largest = max((span.stop - span.start for span in dense.spans(live)), default=0)
        step = max(largest // width // merging.ROWS, 1) * merging.ROWS * width
        for start in range(0, live.numel(), step):
            yield slice(start, min(start + step, live.numel()))

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """A fresh merge of the elements `span` of entry k, in the live dtype, from the base and the
        factors alone."""
        width = self._live[k].shape[-1]
        return self._merge.merged(k, slice(span.start // width, span.stop // width), lam).reshape(
            -1
        )

    def ends(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Base and W(1) of the elements `span` of entry k, in fp32; possibly the base itself."""
        return self.base[k].view(-1)[span].float(), self.merged(k, span, 1.0).float()

    def beside(self) -> list[Tensor]:
        """Every tensor that is kept beside the live copy."""
        return [*self.base, *(factor for entry in self._entries for factor in (entry.u, entry.v))]

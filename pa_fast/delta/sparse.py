"""The sparse store: base and target values at the positions that the delta moves; everything else holds the base for good.

Cost: per moved bf16 weight 4 bytes and its position: 2 bytes, or 1 bit per weight of the tensor where more than 1/16 move.
A switch touches the positions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pa_kernels
import torch
from pa_kernels.reference import BITS, rounded
from pa_kernels.sparse_tensor import TILE, SparseTensor
from torch import Tensor

from pa_fast.delta import dense


class Sparse:
    """T live float tensors that are switched at the positions of their entries.

    Args:
        live, base: T contiguous tensors each, of the same shapes. The base is read only to restore and to verify, and may
            lie elsewhere, such as in a memory map.
        entries: where the live tensors are.
        via: for each entry the dtype that a merge is rounded to before it is stored, or None for the live dtype.

    Numerics: the contract, `pa_kernels.reference.lerp`, between base and the delta's own end.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        base: Sequence[Tensor],
        entries: Sequence[SparseTensor],
        via: Sequence[torch.dtype | None],
    ):
        self._live, self._via, self.base = list(live), list(via), list(base)
        # what a CPU works from, so that nothing is held twice
        self._entries = [entry.as_index() if w.device.type == "cpu" else entry for w, entry in zip(live, entries)]
        self._setting = pa_kernels.Sparse(self._live, self._entries, self._via)

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ) at the positions; elsewhere the live tensors must hold the base."""
        self._setting.run_(lam)

    def restore_(self) -> None:
        """Write what `set_` leaves alone: the base, everywhere."""
        for k, live in enumerate(self._live):
            for span in self.spans(k):
                live.view(-1)[span] = self._still(k, span)

    def spans(self, k: int) -> Iterator[slice]:
        """Pieces of entry k, as slices of its flat elements: whole tiles."""
        return dense.spans(self._live[k])

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """A fresh merge of the elements `span` of entry k, in the live dtype, from the base and the entry alone."""
        made = self._still(k, span)
        piece = cut(self._entries[k], span)
        if piece.count:
            values = torch.empty(piece.count, dtype=made.dtype, device=made.device)
            pa_kernels.lerp_([values], [piece.base], [piece.target], lam, via=[self._via[k]])
            bits = BITS[made.dtype]
            made.view(bits)[piece.positions()] = values.view(bits)
        return made

    def ends(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Base and target of the elements `span` of entry k, in fp32; possibly the base itself."""
        piece = cut(self._entries[k], span)
        base = self.base[k].view(-1)[span].to(self._live[k].device).float()
        target = base.clone()
        target[piece.positions()] = piece.target.float()
        return base, target

    def beside(self) -> list[Tensor]:
        """Every tensor that is kept beside the live copy."""
        return [*self.base, *(t for entry in self._entries for t in (entry.where, entry.starts, entry.base, entry.target))]

    def _still(self, k: int, span: slice) -> Tensor:
        return rounded(self.base[k].view(-1)[span].to(self._live[k].device), self._live[k].dtype, self._via[k])


def cut(entry: SparseTensor, span: slice) -> SparseTensor:
    """The part of `entry` within `span`, which begins with a tile; views, but for `starts`."""
    tile = TILE[entry.kind]
    starts = entry.starts[span.start // tile : -(-span.stop // tile) + 1]
    first, last = starts[[0, -1]].tolist()
    words = slice(span.start // 32, -(-span.stop // tile) * (tile // 32))
    where = entry.where[first:last] if entry.kind == "index" else entry.where[words]
    return SparseTensor(
        entry.kind, span.stop - span.start, where, starts - first, entry.base[first:last], entry.target[first:last]
    )

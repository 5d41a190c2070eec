"""The sparse store: base and target values at the positions that the delta moves; everything else
holds the base for good.

Cost: per moved bf16 weight 4 bytes and its position: 2 bytes, or 1 bit per weight of the tensor
where more than 1/16 move. A switch writes at the positions alone. It reads everything else once, to
see that nobody else has written there.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Sequence

import pa_kernels
import torch
from pa_kernels.cores import inference, over
from pa_kernels.reference import BITS, odd_low, rounded
from pa_kernels.sparse import TILE, SparseTensor
from torch import Tensor

from pa_fast.delta import dense

ROW_BYTES = 512
"""Bytes that are summed as they are, before their sum is multiplied by an odd number of its own:
rows much shorter cost more than reading them."""


class Sparse:
    """T live float tensors that are switched at the positions of their entries.

    Elsewhere λ changes nothing, so a switch writes nothing there. Its sum over those elements,
    which no λ changes either, says whether somebody else did: a tensor with another one is written
    anew from the base.

    Args:
        live, base: T contiguous tensors each, of the same shapes. The base is read only to restore
            and to verify, and may lie elsewhere, such as in a memory map.
        entries: where the live tensors are.
        via: for each entry the dtype that a merge is rounded to before it is stored, or None for
            the live dtype.

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
        self._entries = [
            entry.as_index() if w.device.type == "cpu" else entry for w, entry in zip(live, entries)
        ]
        self._setting = pa_kernels.Sparse(self._live, self._entries, self._via)
        self._pieces = [
            (k, span, cut(self._entries[k], span))
            for k in range(len(self._live))
            for span in self.spans(k)
        ]
        self._still_sums: list[int] | None = None

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ) into every live tensor: at the positions, and where something else has written
        elsewhere, all of it."""
        expected = self._still_sums
        assert expected is not None, "what these tensors hold is not known: restore_ them first"
        found = self._sums()
        self.restore_({k for k, total in enumerate(found) if total != expected[k]})
        self._setting.run_(lam)

    def restore_(self, only: Container[int] | None = None) -> None:
        """Write what `set_` leaves alone: the base, everywhere; into the entries `only`, if
        given."""
        for k, live in enumerate(self._live):
            if only is None or k in only:
                for span in self.spans(k):
                    live.view(-1)[span] = self._still(k, span)
        if self._still_sums is None:
            self._still_sums = self._sums()

    def spans(self, k: int) -> Iterator[slice]:
        """Pieces of entry k, as slices of its flat elements: whole tiles."""
        return dense.spans(self._live[k])

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """A fresh merge of the elements `span` of entry k, in the live dtype, from the base and the
        entry alone."""
        made = self._still(k, span)
        piece = cut(self._entries[k], span)
        if piece.count:
            values = torch.empty(piece.count, dtype=made.dtype, device=made.device)
            pa_kernels.lerp_(
                [values], [piece.base], [piece.target], lam, intermediate_dtypes=[self._via[k]]
            )
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
        return [
            *self.base,
            *(
                t
                for entry in self._entries
                for t in (entry.where, entry.starts, entry.base, entry.target)
            ),
        ]

    def _sums(self) -> list[int]:
        """For each entry a sum of the live elements that no λ changes, mod 2⁶⁴. One read, and one
        wait for the device."""
        totals: list[int] = [0] * len(self._live)
        if self._pieces:
            parts = over(lambda at: self._sum(*at), self._pieces, self._live[0])
            for (k, *_), part in zip(self._pieces, parts):
                totals[k] += int(part)
        return [total % 2**64 for total in totals]

    def _sum(self, k: int, span: slice, piece: SparseTensor) -> Tensor:
        """What the elements `span` add to that sum: Σ over rows of odd(row) · Σ of their 64-bit
        words, int64 []."""
        with inference():
            live = self._live[k].view(-1)[span]
            data = live.view(torch.uint8)
            if data.storage_offset() % 8 or data.numel() % ROW_BYTES:
                padded = torch.zeros(
                    -(-data.numel() // ROW_BYTES) * ROW_BYTES, dtype=torch.uint8, device=live.device
                )
                padded[: data.numel()] = data
                data = padded
            rows = data.view(torch.int64).view(-1, ROW_BYTES // 8).sum(1)
            factors = _row_factors(rows.numel(), live.device)
            total = (rows * factors).sum()
            if piece.count:
                places, per_word = piece.positions(), 8 // live.itemsize
                values = live.view(BITS[live.dtype])[places].long() & ((1 << 8 * live.itemsize) - 1)
                values <<= (places % per_word) * (8 * live.itemsize)
                total -= (values * factors[places // (ROW_BYTES // live.itemsize)]).sum()
            return total * (2 * span.start + 1)

    def _still(self, k: int, span: slice) -> Tensor:
        return rounded(
            self.base[k].view(-1)[span].to(self._live[k].device), self._live[k].dtype, self._via[k]
        )


def cut(entry: SparseTensor, span: slice) -> SparseTensor:
    """The part of `entry` within `span`, which begins with a tile; views, but for `starts`."""
    tile = TILE[entry.kind]
    starts = entry.starts[span.start // tile : -(-span.stop // tile) + 1]
    first, last = starts[[0, -1]].tolist()
    words = slice(span.start // 32, -(-span.stop // tile) * (tile // 32))
    where = entry.where[first:last] if entry.kind == "index" else entry.where[words]
    return SparseTensor(
        entry.kind,
        span.stop - span.start,
        where,
        starts - first,
        entry.base[first:last],
        entry.target[first:last],
    )


@functools.lru_cache(maxsize=256)
def _row_factors(count: int, device: torch.device) -> Tensor:
    return odd_low(torch.arange(count, device=device))

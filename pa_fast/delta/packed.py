"""The packed store: one code for every weight beside the live copy, which itself is all that is
known of base and instruct.

Cost: 1 or 2 bytes per weight and 6 per exception. A switch reads and writes the live copy and reads
the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from weakref import ref

import pa_kernels
import torch
from pa_kernels import PackedTensor
from pa_kernels.packed import packed_pair, packed_target
from torch import Tensor

from pa_fast.delta import dense
from pa_fast.errors import UsageError, WeightsError


class Overwritten(Exception):
    """Live tensors, by number, did not hold what the last switch had left in them."""

    def __init__(self, entries: Sequence[int]):
        super().__init__(f"entries {list(entries)} were overwritten")
        self.entries = list(entries)


class Packed:
    """T live tensors that are switched by codes.

    A switch starts from what they hold. So what it finds is summed, and a foreign write, or a
    switch that did not finish, makes them stale: to be written again from the base.

    Args:
        live: T contiguous tensors.
        base: of the same shapes: tensors to keep, such as memory maps of files; or weak references,
            to what others may let go of. Only writing anew and proving need them.
        entries: codes, where the live tensors are.
        via: taken for what the codes were made with: no rounding but the live dtype's.

    Numerics: the contract, `pa_kernels.reference.lerp`, within the range of the codes.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        base: Sequence[Tensor | ref[Tensor]],
        entries: Sequence[PackedTensor],
        via: Sequence[torch.dtype | None],
    ):
        self._live, self._kept, self._entries = list(live), list(base), list(entries)
        self._packed = pa_kernels.Packed(self._live, self._entries)
        self._stale = True
        self._zeros: list[int] | None = None

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest λ that every tensor can be set to."""
        lows, highs = zip(*(entry.range for entry in self._entries))
        return max(lows), min(highs)

    def check(self, lam: float | Sequence[float]) -> None:
        """Raise UsageError if a λ is outside the range."""
        lams = lam if isinstance(lam, Sequence) else [lam]
        lo, hi = self.range
        odd = [one for one in lams if not lo <= pa_kernels.reference.fp32(one) <= hi]
        if odd:
            raise UsageError(
                f"λ = {odd[0]:g} is outside [{lo:g}, {hi:g}], the range that the packed delta"
                " is for",
                "choose λ within it; for others encode with a wider range (`pa-fast encode --range"
                " LO:HI`, PackedStore(lo, hi)), or use the dense store",
            )

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ) into every live tensor, of one λ for all or of one for each.

        Raises:
            Overwritten: somebody else wrote to some of them.
        """
        assert not self._stale, "what these tensors hold is not known: restore_ them first"
        self._stale = True  # until the last byte is written, and was right before
        self._packed.run_(lam)
        wrong = self._packed.wrong()
        if wrong:
            raise Overwritten(wrong)
        self._stale = False

    def restore_(self, base: Callable[[int], Tensor | None] = lambda k: None) -> None:
        """Write W(0) into every live tensor, whatever it held, from its base, or from what `base`
        gives for it.

        Raises:
            WeightsError: a base is gone, or is not the one that these tensors began with.
        """
        self._stale = True
        for k, live in enumerate(self._live):
            kept = self._at_hand(k)
            source = base(k) if kept is None else kept.detach()
            if source is None:
                raise WeightsError(
                    "packed weights have to be written anew, and their base is gone: nothing but"
                    " their codes is kept",
                    "call resync(base) with the base tensors, or bind again",
                )
            live.copy_(source.view(live.shape))
        self._packed.holds(0.0)
        zeros = self._packed.sums()
        if self._zeros is None:
            self._zeros = zeros
        elif self._zeros != zeros:
            raise WeightsError(
                "these are not the base tensors that the live weights were bound to", "pass those"
            )
        self._stale = False

    def spans(self, k: int) -> Iterator[slice]:
        """Pieces of entry k, as slices of its flat elements: whole tiles."""
        return dense.spans(self._live[k])

    def sum(self, k: int) -> int:
        """The checksum that live tensor k has, if nobody else wrote to it."""
        return self._packed.sums()[k]

    def proven(self, k: int) -> bool:
        """Whether the base of entry k is at hand, so that `merged` can be asked."""
        return self._at_hand(k) is not None

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """A fresh merge of the elements `span` of entry k, in the live dtype, from base and codes
        alone."""
        base = self._at_hand(k)
        assert base is not None, "ask `proven` first"
        start, end = self._from_base(k, span, base)
        out = torch.empty_like(start)
        pa_kernels.lerp_([out], [start], [end], lam)
        return out

    def ends(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Base and target of the elements `span` of entry k, in fp32: from the base, or else from
        the live weights themselves."""
        base = self._at_hand(k)
        if base is None:
            sides = packed_pair(
                self._live[k].view(-1), self._entries[k], span, self._packed.holding(k)
            )
        else:
            sides = self._from_base(k, span, base)
        return sides[0].float(), sides[1].float()

    def beside(self) -> list[Tensor]:
        """Every tensor that is kept beside the live copy."""
        kept = [tensor for tensor in self._kept if isinstance(tensor, Tensor)]
        return [*kept, *(part for entry in self._entries for part in entry.parts.values())]

    def _from_base(self, k: int, span: slice, base: Tensor) -> tuple[Tensor, Tensor]:
        live = self._live[k]
        start = base.view(-1)[span].to(device=live.device, dtype=live.dtype)
        return start, packed_target(start, self._entries[k], span)

    def _at_hand(self, k: int) -> Tensor | None:
        kept = self._kept[k]
        return kept if isinstance(kept, Tensor) else kept()

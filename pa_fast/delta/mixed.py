"""What live weights hold: every entry of a delta, each with its own kind, ready to be switched
together."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Protocol

import torch
from pa_kernels import PackedTensor, SparseTensor
from pa_kernels.cores import Scratch
from pa_kernels.reference import Draw
from torch import Tensor

from pa_fast.delta.dense import Dense
from pa_fast.delta.entry import Entry, Factors, Whole
from pa_fast.delta.lowrank import LowRank
from pa_fast.delta.packed import Overwritten, Packed
from pa_fast.delta.sparse import Sparse

_IN_CACHE = 1 << 17
"""Elements of which three fp32 copies stay in a core's cache."""
_scratch = Scratch()


class Part(Protocol):
    """Live tensors whose entries are of one kind, numbered from 0."""

    def set_(self, lam: float | Sequence[float]) -> None: ...

    def restore_(self) -> None: ...

    def spans(self, k: int) -> Iterator[slice]: ...

    def merged(self, k: int, span: slice, lam: float) -> Tensor: ...

    def ends(self, k: int, span: slice) -> tuple[Tensor, Tensor]: ...

    def beside(self) -> list[Tensor]: ...


HOLDERS: dict[type, Any] = {
    Whole: Dense,
    PackedTensor: Packed,
    SparseTensor: Sparse,
    Factors: LowRank,
}


class Mixed:
    """T live float tensors, their bases and their entries, switched together.

    Args:
        live, base, entries, via: as for the store of each kind; entries are copied to the live
            tensors' devices.
        draws: the noise of stochastic rounding, where all entries are whole.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        base: Sequence[Tensor],
        entries: Sequence[Entry],
        via: Sequence[torch.dtype | None],
        draws: Sequence[Draw | None] | None = None,
    ):
        self._live = list(live)
        self._parts: list[Part] = []
        self._members: list[list[int]] = []
        columns: list[Sequence[Any]] = [live, base, entries, via] + (
            [] if draws is None else [draws]
        )
        self._places: dict[int, tuple[Part, int]] = {}
        for kind, holder in HOLDERS.items():
            members = [t for t, entry in enumerate(entries) if isinstance(entry, kind)]
            if members:
                part = holder(*([column[t] for t in members] for column in columns))
                self._parts.append(part)
                self._members.append(members)
                self._places.update((t, (part, k)) for k, t in enumerate(members))

    def check(self, lam: float | Sequence[float]) -> None:
        """Raise UsageError, before anything is written, if λ is outside the range of a packed
        delta."""
        for part, members in zip(self._parts, self._members):
            if isinstance(part, Packed):
                part.check(_own(lam, members))

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ), of one λ for all or of one for each, as far as another λ would give something
        else.

        Raises:
            Overwritten: somebody else wrote to tensors that are switched from what they hold; all
                have been tried.
        """
        wrong: list[int] = []
        for part, members in zip(self._parts, self._members):
            try:
                part.set_(_own(lam, members))
            except Overwritten as found:
                wrong += [members[k] for k in found.entries]
        if wrong:
            raise Overwritten(wrong)

    def restore_(self, base: Callable[[int], Tensor | None] = lambda t: None) -> None:
        """Write what no λ changes: with `set_`, every byte of every live tensor.

        Args:
            base: entry → its base, for packed ones whose base is not kept; None where there is none
                to give.
        """
        for part, members in zip(self._parts, self._members):
            if isinstance(part, Packed):
                part.restore_(lambda k, members=members: base(members[k]))  # type: ignore[misc]
            else:
                part.restore_()

    def rewrite_(self, written: Container[int]) -> None:
        """Write what `set_` leaves alone of the entries `written`, which something else has written
        to.

        Packed ones say by their sums whether what was written are other bits; if so, `set_` refuses
        them.
        """
        for part, members in zip(self._parts, self._members):
            if isinstance(part, Sparse):
                part.restore_({k for k, t in enumerate(members) if t in written})

    def known_sum(self, t: int) -> int | None:
        """The checksum that live tensor t must have, where that is all that is known of it:
        `merged` cannot be asked then."""
        part, k = self._places[t]
        return part.sum(k) if isinstance(part, Packed) and not part.proven(k) else None

    def spans(self, t: int) -> Iterator[slice]:
        """Pieces of entry t, as slices of its flat elements, small enough to merge on the side."""
        part, k = self._places[t]
        return part.spans(k)

    def merged(self, t: int, span: slice, lam: float) -> Tensor:
        """A fresh merge of the elements `span` of entry t, in the live dtype, which looks at no
        live tensor."""
        part, k = self._places[t]
        return part.merged(k, span, lam)

    def piece_(self, t: int, span: slice, lam: float) -> None:
        """Write the elements `span` of entry t alone, which is whole."""
        part, k = self._places[t]
        assert isinstance(part, Dense)
        part.piece_(k, span, lam)

    def products(self, t: int, span: slice) -> tuple[float, float]:
        """⟨W − B, D − B⟩ and ‖D − B‖² over the elements `span` of entry t, D being the delta's own
        end; fp32."""
        part, k = self._places[t]
        return _products(self._live[t].view(-1)[span], *part.ends(k, span))

    def beside(self) -> list[Tensor]:
        """Every tensor that is kept beside the live copy."""
        return [tensor for part in self._parts for tensor in part.beside()]


def _products(live: Tensor, base: Tensor, end: Tensor) -> tuple[float, float]:
    """The same of flat tensors [N] of any float dtypes: on a CPU piece by piece, in memory that
    each thread keeps."""
    step = _IN_CACHE if live.device.type == "cpu" else live.numel()
    moved = distance = 0.0
    for start in range(0, live.numel(), step):
        sides = [
            (use, side[start : start + step])
            for use, side in (("live", live), ("base", base), ("end", end))
        ]
        if live.device.type == "cpu":
            w, b, d = (
                _scratch.take(use, side.numel(), torch.float32).copy_(side) for use, side in sides
            )
        else:
            w, b, d = (side.to(live.device, torch.float32, copy=True) for _, side in sides)
        w.sub_(b)
        d.sub_(b)
        moved, distance = moved + float(torch.dot(w, d)), distance + float(torch.dot(d, d))
    return moved, distance


def _own(lam: float | Sequence[float], members: Sequence[int]) -> float | list[float]:
    """What of one λ for each tensor is for these; one number where it is one."""
    own = [lam[t] for t in members] if isinstance(lam, Sequence) else [lam]
    return own[0] if len(set(own)) == 1 else own

"""The dense store: both endpoints stay beside the live copy, every λ is computed from them.

Cost: 4 bytes per bf16 parameter beside the live 2; a switch moves 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pa_kernels
from pa_kernels.reference import Draw

from pa_fast.delta.entry import Source, Whole

if TYPE_CHECKING:
    import torch

# Elements merged at a time where a merge is only looked at: on a CPU the pieces stay in cache
# between the passes over them and each is worth the cost of a call; on a GPU one launch hides its
# latency.
_CPU_SPAN = 1 << 20
_GPU_SPAN = 1 << 24


@dataclass(frozen=True)
class DenseStore:
    """Every tensor whole. Cost: |base| + |instruct| bytes per weight beside the live copy."""

    name = "dense"
    exact = True
    lossless = True

    def describe(self) -> str:
        """All options in one line: there are none."""
        return self.name

    def encode(self, sources: Sequence[Source]) -> Iterator[Whole]:
        """Instruct as it is; copied only to reach the live tensor's device."""
        for source in sources:
            yield Whole(source.instruct.to(source.device))


class Dense:
    """T live float tensors and their sources, switched together.

    Args:
        live, base: T contiguous tensors each; entry t of both has the same shape. A base that is
            elsewhere is copied to its live tensor's device, but for one in pinned host memory,
            which a GPU reads where it is.
        entries: the targets, where the live tensors are, or in pinned host memory.
        via: for each entry the dtype that a merge is rounded to before it is stored, or None for
            the live dtype.
        draws: for each entry the noise of stochastic rounding, or None; None for all where not
            given.

    Numerics: the contract, `pa_kernels.reference.lerp`.
    """

    def __init__(
        self,
        live: Sequence[torch.Tensor],
        base: Sequence[torch.Tensor],
        entries: Sequence[Whole],
        via: Sequence[torch.dtype | None],
        draws: Sequence[Draw | None] | None = None,
    ):
        self._live, self._via = list(live), list(via)
        self._draws = [None] * len(live) if draws is None else list(draws)
        self.base = [b if b.is_pinned() else b.to(w.device) for w, b in zip(live, base)]
        self.target = [entry.target for entry in entries]
        self._lerp = pa_kernels.Lerp(self._live, self.base, self.target, self._via, self._draws)

    def set_(self, lam: float | Sequence[float]) -> None:
        """Write W(λ) into every live tensor, of one λ for all or of one for each."""
        self._lerp.run_(lam)

    def restore_(self) -> None:
        """Write what `set_` leaves alone: nothing."""

    def spans(self, t: int) -> Iterator[slice]:
        """Pieces of entry t, as slices of its flat elements, small enough to merge on the side."""
        return spans(self._live[t])

    def merged(self, t: int, span: slice, lam: float) -> torch.Tensor:
        """A fresh merge of the elements `span` of entry t, in the live dtype, computed from the
        sources alone."""
        import torch

        out = torch.empty(
            span.stop - span.start, dtype=self._live[t].dtype, device=self._live[t].device
        )
        self._merge_(out, t, span, lam)
        return out

    def piece_(self, t: int, span: slice, lam: float) -> None:
        """Write the elements `span` of entry t alone."""
        self._merge_(self._live[t].detach().view(-1)[span], t, span, lam)

    def _merge_(self, out: torch.Tensor, t: int, span: slice, lam: float) -> None:
        base, target = (
            [side.view(-1)[span].to(out.device)] for side in (self.base[t], self.target[t])
        )
        draw = self._draws[t]
        here = draw and Draw(draw.key, draw.start + span.start)
        pa_kernels.lerp_([out], base, target, lam, intermediate_dtypes=[self._via[t]], draws=[here])

    def ends(self, t: int, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Base and target of the elements `span` of entry t, in their own dtypes; possibly the
        sources themselves."""
        where = self._live[t].device
        return self.base[t].view(-1)[span].to(where), self.target[t].view(-1)[span].to(where)

    def beside(self) -> list[torch.Tensor]:
        """Every tensor that is kept beside the live copy."""
        return [*self.base, *self.target]


def spans(live: torch.Tensor) -> Iterator[slice]:
    """Pieces of a tensor, as slices of its flat elements."""
    step = _CPU_SPAN if live.device.type == "cpu" else _GPU_SPAN
    for start in range(0, live.numel(), step):
        yield slice(start, min(start + step, live.numel()))

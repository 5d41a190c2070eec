"""The dense store: both endpoints stay beside the live copy, every λ is computed from them.

Cost: 4 bytes per bf16 parameter beside the live 2; a switch moves 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pa_kernels

if TYPE_CHECKING:
    import torch

# Elements merged at a time where a merge is only looked at: on a CPU the pieces stay in cache between the passes over them
# and each is worth the cost of a call; on a GPU one launch hides its latency.
_CPU_SPAN = 1 << 20
_GPU_SPAN = 1 << 24


class Dense:
    """T live float tensors and their sources, switched together.

    Args:
        live, base, instruct: T contiguous tensors each; entry t of all three has the same shape and device.
        via: for each entry the dtype that a merge is rounded to before it is stored, or None for the live dtype.

    Numerics: the contract, `pa_kernels.reference.lerp`.
    """

    name = "dense"
    exact = True

    def __init__(
        self,
        live: Sequence[torch.Tensor],
        base: Sequence[torch.Tensor],
        instruct: Sequence[torch.Tensor],
        via: Sequence[torch.dtype | None],
    ):
        self.base, self.instruct, self._live, self._via = list(base), list(instruct), list(live), list(via)
        self._lerp = pa_kernels.Lerp(self._live, self.base, self.instruct, self._via)

    def set_(self, lam: float) -> None:
        """Write W(λ) into every live tensor."""
        self._lerp.run_(lam)

    def spans(self, t: int) -> Iterator[slice]:
        """Pieces of entry t, as slices of its flat elements, small enough to merge on the side."""
        count = self._live[t].numel()
        step = _CPU_SPAN if self._live[t].device.type == "cpu" else _GPU_SPAN
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def merged(self, t: int, span: slice, lam: float) -> torch.Tensor:
        """A fresh merge of the elements `span` of entry t, in the live dtype, computed from the sources alone."""
        import torch

        out = torch.empty(span.stop - span.start, dtype=self._live[t].dtype, device=self._live[t].device)
        sources = [self.base[t].view(-1)[span]], [self.instruct[t].view(-1)[span]]
        pa_kernels.lerp_([out], *sources, lam, via=[self._via[t]])
        return out

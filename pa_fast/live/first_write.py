"""The first write on a CPU of a store that keeps the sources as they are: all that is asked of a
piece of them, while it is in cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pa_kernels.cores import over_cores
from pa_kernels.reference import LIVE_DTYPES

from pa_fast.live.binding import Binding
from pa_fast.live.encoding import OnRead, check_finite, is_finite
from pa_fast.live.ends import Checked, differing, refuse
from pa_fast.stores.composite import CompositeStore
from pa_fast.stores.store import Store


@dataclass(frozen=True)
class FirstWrite:
    """What the pieces are held against as they are written.

    Attributes:
        ends: what the live tensors must be at which λ.
        allow_nonfinite: let NaN and infinity in the sources pass.
        on_read: told of each piece of the sources.
    """

    ends: Checked
    allow_nonfinite: bool
    on_read: OnRead | None = None

    @staticmethod
    def fits(made: Sequence[Binding], store: Store) -> bool:
        """Whether `store` can write these tensors piece by piece."""
        return store.keeps_sources and all(
            b.live.device.type == "cpu" for b in made if b.live.dtype in LIVE_DTYPES
        )

    def write_(self, store: CompositeStore, floats: Sequence[Binding]) -> None:
        """Write λ = 0 into every live float tensor, by way of the other λ of `ends`.

        Cost: reads both sources once, writes the live tensors once; what is read again lies in
            cache.

        Raises:
            DataError: a source is not finite.
            WeightsError: an end is not what it must be.
        """
        lams = [*sorted(self.ends.keys() - {0.0}), 0.0]

        def write(at: tuple[int, slice]) -> None:
            t, span = at
            binding = floats[t]
            for side, tensor in binding.sources.items():
                if not self.allow_nonfinite and not is_finite(tensor.view(-1)[span]):
                    check_finite([(side, binding.name, tensor)])
                if self.on_read is not None:
                    self.on_read(tensor, span.start, tensor.view(-1)[span])
            for lam in lams:
                store.write_(t, span, lam)
                if lam in self.ends:
                    refuse([differing(binding, lam, self.ends, span)], lam)

        over_cores(write, [(t, span) for t in range(len(floats)) for span in store.spans(t)])

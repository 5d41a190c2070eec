"""The store of a delta that is given by its factors, as an adapter is: there is nothing to
decompose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pa_fast.delta.entry import Entry, Factors, Source
from pa_fast.delta.sparse_store import SparseStore
from pa_fast.errors import PairError


@dataclass(frozen=True, eq=False)
class LoraStore:
    """W(λ) = B + λUV for the weights in `factors`, and B for all others, whatever stands on the
    instruct side.

    The adapted model is the instruct model: nothing of the delta is lost, and the base stands on
    both sides.

    Args:
        factors: first name of a weight → U [M, R] and V [R, N]; see `lora_import.read`.
    """

    factors: Mapping[str, Factors]

    name = "lowrank"
    exact = False
    lossless = True

    def describe(self) -> str:
        """All options in one line."""
        ranks = [factors.u.shape[-1] for factors in self.factors.values()]
        return f"{self.name}, adapter of {len(ranks)} weights, rank {max(ranks, default=0)}"

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """The entry of each source, in order and one at a time.

        Raises:
            PairError: factors of a weight that is no source, or of another shape.
        """
        missing = self.factors.keys() - {source.name for source in sources}
        if missing:
            raise PairError(
                f"the adapter changes `{min(missing)}`, which is not live",
                "give the base that it was trained on",
            )
        for source in sources:
            factors = self.factors.get(source.name)
            if factors is None:
                # a sparse delta of nothing: it costs next to nothing
                yield from SparseStore().encode([replace(source, instruct=source.base)])
                continue
            u, v = factors.u, factors.v
            if (u.shape[0], v.shape[1]) != source.base.shape:
                found = f"{[u.shape[0], v.shape[1]]}, the base has {list(source.base.shape)}"
                raise PairError(
                    f"the adapter's `{source.name}` is {found}",
                    "give the base that it was trained on",
                )
            yield Factors(u.to(source.device).contiguous(), v.to(source.device).contiguous())

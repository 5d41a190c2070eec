"""From bindings and a plan to the entries that live weights hold, each where the plan wants it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pa_kernels.reference import LIVE_DTYPES

from pa_fast.live.binding import Binding
from pa_fast.live.encoding import OnRead, sources
from pa_fast.live.memory import FreeMemory, nbytes
from pa_fast.stores import registry
from pa_fast.stores.store import Entry, Store, TensorSize

if TYPE_CHECKING:
    import torch


CHUNK_BYTES = 1 << 30
_ALIGNMENT_BYTES = 256


class PinnedPool:
    """Copies of tensors, one after another in chunks of a power of two bytes, kept for as long as a
    view of them is.

    Args:
        pinned: whether the memory is pinned, which takes a GPU.
    """

    def __init__(self, pinned: bool = True):
        self._pinned = pinned
        self._chunk: torch.Tensor | None = None
        self._at = 0
        self._made: dict[tuple[int, int], torch.Tensor] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in the arena, contiguous and aligned; the same one for the same
        memory."""
        import torch

        key = (tensor.data_ptr(), tensor.nbytes)
        if tensor.nbytes and key in self._made:
            return self._made[key].view(tensor.dtype).view(tensor.shape)
        if self._chunk is None or self._at + tensor.nbytes > self._chunk.numel():
            size = max(CHUNK_BYTES, 1 << (tensor.nbytes - 1).bit_length() if tensor.nbytes else 1)
            self._chunk, self._at = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned), 0
        room = self._chunk[self._at : self._at + tensor.nbytes]
        self._at += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        made = room.view(tensor.dtype).view(tensor.shape)
        made.copy_(tensor)
        self._made[key] = room
        return made


# --- placement
#
# From bindings and a plan to the entries that live weights hold, each where the plan wants it.


def room(made: Sequence[Binding]) -> FreeMemory | None:
    """Memory of the live float tensors' device; None where there are none."""
    return next((FreeMemory.of(b.live.device) for b in made if b.live.dtype in LIVE_DTYPES), None)


def sizes(made: Sequence[Binding]) -> list[TensorSize]:
    """What each live float tensor takes, and a dense delta beside it."""
    return [
        TensorSize(
            b.name,
            nbytes(b.live),
            sum(nbytes(side) for side in b.sources.values()),
            (b.base, b.sources["instruct"]),
        )
        for b in made
        if b.live.dtype in LIVE_DTYPES
    ]


def placed(
    made: Sequence[Binding],
    store: Store,
    host: Collection[str],
    allow_nonfinite: bool,
    on_read: OnRead | None = None,
) -> tuple[list[Binding], Iterator[Entry]]:
    """The bindings, and the entries that `store` makes of them, in order; of those called `host` in
    pinned host memory.

    What is to lie on the host never goes to the device: it is encoded where it is read.

    Raises:
        DataError: a source is not finite.
    """
    given = sources(made, allow_nonfinite, on_read)
    if not host:
        return list(made), store.encode(given)
    import torch

    arena, cpu = PinnedPool(), torch.device("cpu")
    encoded = store.encode([replace(s, device=cpu) if s.name in host else s for s in given])
    entries = (
        registry.owner(entry).pinned(entry, arena.copy)
        if source.name in host and source.device != cpu
        else entry
        for source, entry in zip(given, encoded)
    )
    kept = [
        (
            replace(b, sources={**b.sources, "base": arena.copy(b.base)})
            if b.name in host and store.reads_base and b.live.device.type == "cuda"
            else b
        )
        for b in made
    ]
    return kept, entries

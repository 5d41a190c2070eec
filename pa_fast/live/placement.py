"""From bindings and a plan to the entries that live weights hold, each where the plan wants it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from pa_kernels.reference import LIVE_DTYPES

from pa_fast.live.arena import Arena
from pa_fast.live.binding import Binding
from pa_fast.live.encoding import OnRead, sources
from pa_fast.live.memory import nbytes
from pa_fast.live.room import Room
from pa_fast.stores import registry
from pa_fast.stores.store import Entry, Store, TensorSize


def room(made: Sequence[Binding]) -> Room | None:
    """Memory of the live float tensors' device; None where there are none."""
    return next((Room.of(b.live.device) for b in made if b.live.dtype in LIVE_DTYPES), None)


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

    arena, cpu = Arena(), torch.device("cpu")
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

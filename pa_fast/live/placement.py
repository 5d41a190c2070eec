"""Entries of live weights, made from bindings and placed in the memory that a plan chose."""

from __future__ import annotations

from collections import Counter
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


POOL_CHUNK_BYTES = 1 << 30
_ALIGNMENT_BYTES = 256


class PinnedPool:
    """Pinned host memory in chunks of a power of two bytes, for copies of tensors one after
    another. A chunk lives as long as a view of it does.

    Args:
        pinned: whether the memory is pinned, which takes a GPU.
    """

    def __init__(self, pinned: bool = True):
        self._pinned = pinned
        self._chunk: torch.Tensor | None = None
        self._used_bytes = 0
        self._copies: dict[tuple[int, int], torch.Tensor] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of `tensor` in the pool, contiguous and aligned; the same copy for the same
        memory."""
        import torch

        key = (tensor.data_ptr(), tensor.nbytes)
        if tensor.nbytes and key in self._copies:
            return self._copies[key].view(tensor.dtype).view(tensor.shape)
        if self._chunk is None or self._used_bytes + tensor.nbytes > self._chunk.numel():
            size = max(
                POOL_CHUNK_BYTES, 1 << (tensor.nbytes - 1).bit_length() if tensor.nbytes else 1
            )
            self._chunk, self._used_bytes = (
                torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned),
                0,
            )
        target = self._chunk[self._used_bytes : self._used_bytes + tensor.nbytes]
        self._used_bytes += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        copied = target.view(tensor.dtype).view(tensor.shape)
        copied.copy_(tensor)
        self._copies[key] = target
        return copied


# --- placement


def free_memory(bound: Sequence[Binding]) -> FreeMemory | None:
    """Return the free memory for what lies beside the live float tensors; None where it is not
    known, or there are no such tensors.

    Of tensors on several GPUs, what lies beside them is spread as they are: so it is the memory
    of that GPU which is full first, for the share that it holds. Tensors on the host beside
    those on GPUs take none: their sources stay where they are.
    """
    floats = [b.live for b in bound if b.live.dtype in LIVE_DTYPES]
    held: Counter[torch.device] = Counter()
    for live in floats:
        held[live.device] += nbytes(live)
    devices = [device for device in held if device.type == "cuda"] or list(held)[:1]
    known = {device: FreeMemory.of(device) for device in devices}
    if len(known) < 2:
        return next(iter(known.values()), None)
    whole = sum(held[device] for device in known)
    free_bytes = min(
        memory.free_bytes * whole // max(held[device], 1)
        for device, memory in known.items()
        if memory is not None
    )
    return FreeMemory(free_bytes, sum(m.total_bytes for m in known.values() if m is not None))


def sizes(bound: Sequence[Binding]) -> list[TensorSize]:
    """Return the bytes of each live float tensor, and of a dense delta beside it."""
    return [
        TensorSize(
            b.name,
            nbytes(b.live),
            sum(nbytes(side) for side in b.sources.values()),
            (b.base, b.sources["instruct"]),
        )
        for b in bound
        if b.live.dtype in LIVE_DTYPES
    ]


def placed(
    bound: Sequence[Binding],
    store: Store,
    host: Collection[str],
    allow_nonfinite: bool,
    on_read: OnRead | None = None,
) -> tuple[list[Binding], Iterator[Entry]]:
    """Return the bindings, and the entries that `store` encodes of them, in order.

    Args:
        host: names of tensors whose entry goes to pinned host memory. It is encoded on the host,
            and never goes to the device.
        on_read: called with each piece of the sources that is checked.

    Raises:
        DataError: a source is not finite.
    """
    given = sources(bound, allow_nonfinite, on_read)
    if not host:
        return list(bound), store.encode(given)
    import torch

    pool, cpu = PinnedPool(), torch.device("cpu")
    encoded = store.encode([replace(s, device=cpu) if s.name in host else s for s in given])
    entries = (
        registry.owner(entry).pinned(entry, pool.copy)
        if source.name in host and source.device != cpu
        else entry
        for source, entry in zip(given, encoded)
    )
    kept = [
        (
            replace(b, sources={**b.sources, "base": pool.copy(b.base)})
            if b.name in host and store.reads_base and b.live.device.type == "cuda"
            else b
        )
        for b in bound
    ]
    return kept, entries

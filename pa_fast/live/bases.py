"""Which base tensors live weights keep: all that a store needs, and of others those alone
that cost no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pa_fast.live.binding import Binding
from pa_fast.live.memory import FileMaps
from pa_fast.stores import registry
from pa_fast.stores.store import Entry


def kept_bases(floats: Sequence[Binding], entries: Sequence[Entry]) -> list[Any]:
    """The base of each entry; of one whose store does not need it a memory map of a file, or else a
    weak reference to what the caller holds."""
    spared = [not registry.owner(entry).needs_base for entry in entries]
    maps = FileMaps() if any(spared) else None
    return [
        (
            binding.origin
            if spare and maps and binding.origin and not _mapped(maps, binding)
            else binding.base
        )
        for binding, spare in zip(floats, spared)
    ]


def _mapped(maps: FileMaps, binding: Binding) -> bool:
    return binding.base.device.type == "cpu" and maps.holds(binding.base)

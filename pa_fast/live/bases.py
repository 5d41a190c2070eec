"""Which base tensors live weights keep: all that a store needs, of a packed one those alone that
cost no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pa_kernels import PackedTensor

from pa_fast.delta.entry import Entry
from pa_fast.live.binding import Binding
from pa_fast.live.memory import FileMaps


def kept_bases(floats: Sequence[Binding], entries: Sequence[Entry]) -> list[Any]:
    """The base of each entry; of packed ones a memory map of a file, or else a weak reference to
    what the caller holds."""
    if not any(isinstance(entry, PackedTensor) for entry in entries):
        return [binding.base for binding in floats]
    maps = FileMaps()
    return [
        (
            binding.origin
            if isinstance(entry, PackedTensor) and binding.origin and not _mapped(maps, binding)
            else binding.base
        )
        for binding, entry in zip(floats, entries)
    ]


def _mapped(maps: FileMaps, binding: Binding) -> bool:
    return binding.base.device.type == "cpu" and maps.holds(binding.base)

"""Pinned host memory that a GPU reads through its own pointers: chunks, because pinned sizes are
rounded up to powers of two."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pa_kernels import PackedTensor, SparseTensor

from pa_fast.delta.entry import Entry, Whole, parts

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 30
_ALIGNMENT_BYTES = 256


class Arena:
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

    def entry(self, entry: Entry) -> Entry:
        """`entry` with its large parts in the arena; the factors of a product stay where they
        are."""
        if isinstance(entry, Whole):
            return Whole(self.copy(entry.target))
        if isinstance(entry, (PackedTensor, SparseTensor)):
            moved: dict[str, Any] = {
                name: self.copy(part) for name, part in parts(entry).items() if name != "span"
            }
            return replace(entry, **moved)
        return entry

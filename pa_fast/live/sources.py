"""Sources: the tensors that live weights lie between, and hooks for the loader that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Sources:
    """Tensors of both sides. A loader that knows the files they come from overrides the methods in
    a subclass.

    Attributes:
        base: name → tensor, of the live names.
        instruct: likewise; None where a delta file takes its place.
        intermediate_dtype: for names whose live tensor is wider than the dtype that a saved merge
            would have, that dtype.
        checkpoint_names: live name → names of the checkpoint's tensors whose elements it holds,
            which λ rules and noise use; None: every tensor's own name.
    """

    def __init__(
        self,
        base: Mapping[str, torch.Tensor],
        instruct: Mapping[str, torch.Tensor] | None = None,
        intermediate_dtype: Mapping[str, torch.dtype] | None = None,
        checkpoint_names: Mapping[str, Sequence[str]] | None = None,
    ):
        self.base, self.instruct = base, instruct
        self.intermediate_dtype = intermediate_dtype or {}
        self.checkpoint_names = checkpoint_names

    def check(self) -> None:
        """Raise DataError if the tensors are not what they were. Called before they are read."""

    def reopen(self) -> Mapping[str, torch.Tensor]:
        """Read the base tensors again, for a store that keeps none of them, after a foreign write;
        return none where they cannot be read."""
        return {}

    def note_read(self, tensor: torch.Tensor, start: int, piece: torch.Tensor) -> None:
        """Take note of `piece`, the elements of `tensor` from `start` on, while it is in cache.
        Called from several threads."""

    def release(self) -> None:
        """Drop the tensors: the store has what it needs of them."""
        self.base, self.instruct = {}, None

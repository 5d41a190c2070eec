"""What live weights lie between, and how those who made it are asked about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Sources:
    """The tensors of both sides. This class is for tensors of which nothing else is known; a loader
    that knows the files they come from says so in a subclass.

    Attributes:
        base: name → tensor, of the live names.
        instruct: likewise; None where a delta file stands for it.
        intermediate_dtype: for names whose live tensor is wider than the dtype that a saved merge
            would have, that dtype.
        checkpoint_names: live name → names of the checkpoint's tensors whose elements it holds,
            which λ rules and noise go by; None: every tensor's own name.
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
        """The base tensors, read once more; nothing where they cannot be. For a store that keeps
        none of them, after a foreign write."""
        return {}

    def note_read(self, tensor: torch.Tensor, start: int, piece: torch.Tensor) -> None:
        """Note that the elements of `tensor` from `start` on were read: `piece`, which is in cache.
        Called from several threads, for whoever wants them anyway."""

    def release(self) -> None:
        """Let go of the tensors: what a store needs of them it has."""
        self.base, self.instruct = {}, None

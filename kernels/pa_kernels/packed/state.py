"""State that a packed switch keeps beside live tensors and codes: what these tensors are known to
hold."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pa_kernels import switch
from pa_kernels.packed.codes import PackedTensor


@dataclass(frozen=True, kw_only=True)
class PackedRow(switch.SwitchRow):
    """One entry: operands are the live tensor, codes, starts, where, base, target, and starts and
    places of crossing weights, or the former ones again."""

    entry: PackedTensor

    @property
    def kind(self) -> Hashable:
        return super().kind, self.entry.width, self.entry.layout


class State:
    """State of the T live tensors of a group, on their device.

    Attributes:
        olds: fp32 λ that each of them holds.
        sums: int64 checksums that they have with it.
        wrong: bool, tensors that had another sum, since they were last taken for right.
        before, after: int64, where a switch adds up the checksums that it reads and leaves behind.
    """

    def __init__(self, count: int, device: torch.device):
        self.olds = torch.zeros(count, dtype=torch.float32, device=device)
        self.sums, self.before, self.after = (
            torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.wrong = torch.zeros(count, dtype=torch.bool, device=device)

    def hold_(self, lams: Tensor, sums: Tensor) -> None:
        """Take the tensors for right, with these λ and sums."""
        self.olds.copy_(lams)
        self.sums.copy_(sums)
        for table in (self.wrong, self.before, self.after):
            table.zero_()

    def switched_(self, lams: Tensor) -> None:
        """Take note of a switch to `lams`, whose sums are in `before` and `after`. Touches device
        memory only, so a CUDA graph can record it."""
        self.wrong |= self.before != self.sums
        self.sums.copy_(self.after)
        self.olds.copy_(lams)
        self.before.zero_()
        self.after.zero_()


def signed(sums: Sequence[int]) -> Tensor:
    """Checksums as int64, by their bits."""
    patterns = [(total + 2**63) % 2**64 - 2**63 for total in sums]
    return torch.tensor(patterns, dtype=torch.int64, device="cpu")

"""What every prepared switch shares: groups of tensors that are rewritten together, and the λ
tables that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.cores import inference, settle


class Group(Protocol):
    """Entries that are rewritten together. Writing `lams` and calling `launch_` is all that a
    switch does."""

    entries: tuple[int, ...]
    lams: Tensor

    def launch_(self) -> None: ...


class Switch:
    """T live tensors, prepared once so that each λ costs one pass and nothing else.

    Attributes:
        count: T.
        groups: between them every entry once. `group.lams` is the fp32 λ table in the group's own
            memory, `group.entries` says whose λ stands where.
    """

    count: int
    groups: tuple[Group, ...]

    def run_(self, lam: float | Sequence[float]) -> None:
        """Rewrite every live tensor for λ, one for all or one for each.

        Raises:
            ValueError: a λ is not finite in fp32, or there are not as many as tensors.
        """
        lams = one_for_each(lam, self.count)
        settle()  # a helper that an interrupt has left at work reads the tables
        with inference():
            for group in self.groups:
                if isinstance(lam, Sequence):
                    group.lams.copy_(
                        torch.tensor([lams[t] for t in group.entries], dtype=torch.float32)
                    )
                else:
                    group.lams.fill_(lams[0])
        self.launch_()

    def launch_(self) -> None:
        """Rewrite every live tensor for the λ that the groups' tables hold; on a GPU without
        touching the host."""
        for group in self.groups:
            group.launch_()


def one_for_each(lam: float | Sequence[float], count: int) -> list[float]:
    """λ of each tensor, rounded to fp32, −0 made 0; at least one, so that a bad λ is found where
    there are no tensors."""
    if isinstance(lam, Sequence):
        if len(lam) != count:
            raise ValueError(f"{len(lam)} λ for {count} tensors: expected one, or one for each")
        return [reference.fp32(x) + 0.0 for x in lam]
    return [reference.fp32(lam) + 0.0] * max(count, 1)


def refuse_flushed_denormals() -> None:
    if float(torch.full((), 1e-39, dtype=torch.float32, device="cpu") * 0.5) == 0.0:
        raise RuntimeError(
            "denormal numbers are flushed to zero in this process: call"
            " torch.set_flush_denormal(False) to merge exactly"
        )

"""Checks of the parts of stored deltas: whatever a file holds, no write leaves its tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pa_kernels.cores import parallel_map
from pa_kernels.switch import listed

CPU_SPAN, GPU_SPAN = 1 << 20, 1 << 24
"""Entries per unit of work: scratch of a few MB, on a GPU of 0.4 GB at most."""


def check_part(
    name: str, part: Tensor, dtypes: Sequence[torch.dtype], size: int, device: torch.device
) -> None:
    """Raise ValueError unless a part is contiguous, of one of `dtypes`, of `size` elements and on
    `device`."""
    if part.dtype not in dtypes:
        raise ValueError(f"{name} is {part.dtype}, expected {listed(dtypes)}")
    if part.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(part.shape)}, expected ({size},)")
    if not part.is_contiguous():
        raise ValueError(f"{name} has stride {part.stride()}, expected contiguous")
    if part.device != device:
        raise ValueError(f"{name} is on {part.device}, other parts on {device}")


def check_starts(starts: Tensor, count: int) -> None:
    """Raise ValueError unless `starts`, entries before each tile, ascend from 0 to `count`."""
    starts = starts.long()
    # the range first: differences of what is in range cannot overflow
    outside = bool(((starts < 0) | (starts > count)).any())
    if outside or int(starts[0]) or int(starts[-1]) != count or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"starts go from {int(starts.min())} to {int(starts.max())}, expected ascending from 0"
            f" to {count}"
        )


def check_index(where: Tensor, starts: Tensor, tile: int, numel: int) -> None:
    """Raise ValueError unless positions ascend within a tensor of `numel` elements.

    Args:
        where: uint16 [P], places within tiles of `tile` elements, tile after tile.
        starts: checked, entries before each tile, and P.

    Cost: one read of `where`, in bounded memory.
    """
    starts = starts.long()
    span = CPU_SPAN if where.device.type == "cpu" else GPU_SPAN

    def check_span(first: int) -> None:
        places = where[first : first + span + 1].int()
        # of larger tiles every uint16 is a place
        if tile < 1 << 16 and bool((places >= tile).any()):
            raise ValueError(f"place {int(places.max())} in a tile, expected less than {tile}")
        falls = (places[1:] <= places[:-1]).nonzero().view(-1)
        entry = falls + first + 1
        wrong = starts[torch.searchsorted(starts, entry)] != entry
        if bool(wrong.any()):
            k = int(falls[wrong][0])
            raise ValueError(
                f"place {int(places[k + 1])} of entry {first + k + 1} follows place"
                f" {int(places[k])} in one tile, expected ascending"
            )

    count, tiles = where.numel(), starts.numel() - 1
    parallel_map(check_span, range(0, count, span), where)
    if count and int(starts[tiles - 1]) < count:
        check_last(int(where[-1]) + (tiles - 1) * tile, numel)


def check_last(position: int, numel: int) -> None:
    """Raise ValueError unless the last position is within a tensor of `numel` elements."""
    if position >= numel:
        raise ValueError(f"position {position} in a tensor of {numel} elements, expected less")

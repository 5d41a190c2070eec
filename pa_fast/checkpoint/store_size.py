"""Bytes that each store would take beside the live copy of one tensor, from counts alone."""

from __future__ import annotations

from dataclasses import dataclass

from pa_fast.checkpoint.delta_sums import DeltaSums


@dataclass(frozen=True)
class StoreSize:
    """Bytes beside the live copy. `packed` is as `dense` where a tensor cannot be packed, or
    packing does not pay."""

    dense: int = 0
    sparse: int = 0
    packed: int = 0

    def __add__(self, other: StoreSize) -> StoreSize:
        return StoreSize(
            self.dense + other.dense, self.sparse + other.sparse, self.packed + other.packed
        )


def store_size(sums: DeltaSums, item_bytes: tuple[int, int], live: str) -> StoreSize:
    """What a tensor would take in each store.

    Args:
        sums: over all of its elements, or scaled to as many.
        item_bytes: of one element of base and of instruct, in their files.
        live: safetensors dtype of the live tensor.
    """
    from pa_kernels.packed import packed_bytes
    from pa_kernels.sparse import position_bytes

    numel, both = sums.weights, sum(item_bytes)
    changed = numel - sums.unchanged
    where = min(position_bytes("index", numel, changed), position_bytes("bitmap", numel, changed))
    packed = [numel * both]
    if not sums.inexact and live in ("BF16", "F16"):
        packed += [
            packed_bytes(numel, sums.no_small_code, 8),
            packed_bytes(numel, sums.no_large_code, 16),
        ]
    return StoreSize(numel * both, where + changed * both, min(packed))

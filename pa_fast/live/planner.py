"""Which store holds a delta and where it lies: as asked for, or what fits the memory that is free,
with the reason in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pa_fast.delta.dense import DenseStore
from pa_fast.delta.entry import Store
from pa_fast.delta.lowrank_store import LowRankStore
from pa_fast.delta.packed_store import PackedStore
from pa_fast.delta.sparse_store import SparseStore
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.room import Room
from pa_fast.units import format_bytes

if TYPE_CHECKING:
    import torch

STORES: dict[str, Callable[[], Store]] = {
    "auto": DenseStore,
    "dense": DenseStore,
    "packed": PackedStore,
    "sparse": SparseStore,
    "lowrank": LowRankStore,
    "attached": partial(LowRankStore, attached=True),
}
RESIDENCIES = ("auto", "device", "host")

_SPARE = 1 / 16
"""Share of a device's memory that is left to activations and caches."""
_SAMPLES, _SAMPLE = 24, 1 << 16
"""Pieces, and elements of each, from which the size of packed codes is estimated."""


def planned(store: str | Store) -> Store:
    """The store of that name with its default options, or the one given; `auto` never picks a lossy
    one.

    Raises:
        UsageError: there is no such store.
    """
    if not isinstance(store, str):
        return store
    if store not in STORES:
        raise UsageError(f"store `{store}` is not available", f"available: {', '.join(STORES)}")
    return STORES[store]()


def check_residency(residency: str) -> None:
    """Raise UsageError unless `residency` is auto, device or host."""
    if residency not in RESIDENCIES:
        raise UsageError(
            f"residency `{residency}` is not available", f"available: {', '.join(RESIDENCIES)}"
        )


@dataclass(frozen=True)
class Size:
    """A live tensor and what a dense delta keeps beside it, in bytes; base and instruct to sample
    where they are at hand."""

    name: str
    live_bytes: int
    beside_bytes: int
    sides: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Plan:
    """What holds a delta.

    Attributes:
        store: how.
        host: names of the tensors whose part of the delta lies in pinned host memory; all others
            lie on the device.
        reason: why, in one line.
    """

    store: Store
    host: frozenset[str]
    reason: str

    def describe(self) -> str:
        """Store, residency and reason in one line."""
        where = "" if not self.host else f", {len(self.host)} tensors of it in pinned host memory"
        return f"{self.store.describe()}{where}: {self.reason}"


def plan(
    sizes: Sequence[Size],
    store: str | Store,
    residency: str,
    room: Room | None,
    *,
    allocated: bool = True,
    reason: str = "as asked for",
) -> Plan:
    """Choose what was left open: dense, else packed, on the device where it fits, else dense in
    host memory.

    Args:
        sizes: one for each live float tensor.
        store, residency: as asked for, or `auto`.
        room: of the live tensors' device, None where that is not known.
        allocated: whether the live tensors are there already.
        reason: why `store` is not `auto`.

    Cost: nothing but arithmetic; where dense does not fit a sample of the tensors is encoded.

    Raises:
        UsageError: unknown store or residency.
        WeightsError: the live copy alone does not fit, on a CPU with packed codes where these were
            asked for; with the figures.
    """
    check_residency(residency)
    chosen = planned(store)
    everything = frozenset(size.name for size in sizes)
    live = 0 if allocated else sum(size.live_bytes for size in sizes)
    if room is None or room.on_host:
        codes = packed_estimate(sizes) if chosen.name == "packed" and not allocated else 0
        if room is not None and live + codes > room.free_bytes:
            beside = f" and packed codes about {format_bytes(codes)}" if codes else ""
            raise WeightsError(
                f"the live copy takes {format_bytes(live)}{beside}, and"
                f" {format_bytes(room.free_bytes)} of memory are free",
                "free some, take a larger machine, or split the model (--engine tensor-parallel)",
            )
        return Plan(
            chosen,
            frozenset(),
            "on a CPU both sides stay where they are" if store == "auto" else reason,
        )
    left = room.free_bytes - live - int(room.total_bytes * _SPARE)
    if left < 0:
        raise WeightsError(
            f"the live copy takes {format_bytes(live)}, and {format_bytes(room.free_bytes)} of"
            " device memory are free",
            "free some, take a larger device, or split the model (--engine tensor-parallel)",
        )
    if residency == "host":
        return Plan(
            chosen,
            everything,
            "auto is dense where residency is host" if store == "auto" else reason,
        )
    if store != "auto" and (residency == "device" or chosen.name not in ("dense", "packed")):
        return Plan(chosen, frozenset(), reason)
    dense = sum(size.beside_bytes for size in sizes)
    free = f"{format_bytes(left)} are free beside the live copy"
    if chosen.name == "dense" and dense <= left:
        return Plan(chosen, frozenset(), f"takes {format_bytes(dense)}, and {free}")
    codes = packed_estimate(sizes)
    if (store == "auto" or chosen.name == "packed") and codes <= left:
        held = chosen if chosen.name == "packed" else PackedStore()
        return Plan(
            held,
            frozenset(),
            f"takes about {format_bytes(codes)} where dense takes {format_bytes(dense)}, and"
            f" {free}",
        )
    taken = codes if chosen.name == "packed" else dense
    if residency == "device":
        return Plan(chosen, frozenset(), f"takes {format_bytes(taken)}, and {free}: it may not fit")
    host = _too_much(sizes, taken - left, taken / max(dense, 1))
    return Plan(
        chosen, host, f"takes {format_bytes(taken)}, packed about {format_bytes(codes)}, and {free}"
    )


def packed_estimate(sizes: Iterable[Size]) -> int:
    """Bytes that packed codes will take, by pieces of the largest tensors; as many as dense where
    nothing is at hand."""
    from pa_kernels import PackedTensor

    sampled = sorted((s for s in sizes if s.sides is not None), key=lambda s: -s.beside_bytes)[
        :_SAMPLES
    ]
    taken = whole = 0
    for size in sampled:
        base, instruct = size.sides  # type: ignore[misc]
        start = max(base.numel() - _SAMPLE, 0) // 2
        b, i = (side.reshape(-1)[start : start + _SAMPLE].cpu() for side in (base, instruct))
        made = PackedTensor.encode(b, i) if b.dtype == i.dtype and b.element_size() == 2 else None
        whole += b.nbytes + i.nbytes
        taken += b.nbytes + i.nbytes if made is None else min(made.nbytes, b.nbytes + i.nbytes)
    dense = sum(size.beside_bytes for size in sizes)
    return dense if not whole else int(dense * taken / whole)


def _too_much(sizes: Iterable[Size], excess: float, share: float) -> frozenset[str]:
    """The largest tensors, until the bytes that they take beside the live copy are more than
    `excess`."""
    host = []
    for size in sorted(sizes, key=lambda size: -size.beside_bytes):
        if excess <= 0:
            break
        host.append(size.name)
        excess -= size.beside_bytes * share
    return frozenset(host)

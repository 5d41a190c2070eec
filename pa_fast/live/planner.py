"""The plan of a delta: its store and where that lies, as asked for or as fits the free memory, with
the reason in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.memory import FreeMemory
from pa_fast.stores import registry
from pa_fast.stores.store import Store, TensorSize
from pa_fast.units import format_bytes

RESIDENCIES = ("auto", "device", "host")

_SPARE = 1 / 16
"""Share of a device's memory that is left to activations and caches."""


def check_residency(residency: str) -> None:
    """Raise UsageError unless `residency` is auto, device or host."""
    if residency not in RESIDENCIES:
        raise UsageError(
            f"residency `{residency}` is not available", f"available: {', '.join(RESIDENCIES)}"
        )


@dataclass(frozen=True)
class Plan:
    """The store of a delta and where it lies.

    Attributes:
        store: how the delta is held.
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
    sizes: Sequence[TensorSize],
    store: str | Store,
    residency: str,
    free_memory: FreeMemory | None,
    *,
    allocated: bool = True,
    reason: str = "as asked for",
) -> Plan:
    """Choose the store and residency that are `auto`: dense, else packed, on the device where it
    fits, else dense in host memory.

    Args:
        sizes: one for each live float tensor.
        store, residency: as asked for, or `auto`.
        free_memory: of the live tensors' device, None where that is not known.
        allocated: whether the live tensors are there already.
        reason: why `store` is not `auto`.

    Cost: nothing but arithmetic; where dense does not fit a sample of the tensors is encoded.

    Raises:
        UsageError: unknown store or residency.
        WeightsError: the live copy alone does not fit, on a CPU with packed codes where these were
            asked for; with the figures.
    """
    check_residency(residency)
    chosen, auto = registry.named(store), store == "auto"
    live = 0 if allocated else sum(size.live_bytes for size in sizes)
    if free_memory is None or free_memory.on_host:
        held = 0 if chosen.keeps_sources or allocated else chosen.estimate(sizes) or 0
        if free_memory is not None and live + held > free_memory.free_bytes:
            beside = f" and {chosen.name} codes about {format_bytes(held)}" if held else ""
            raise WeightsError(
                f"the live copy takes {format_bytes(live)}{beside}, and"
                f" {format_bytes(free_memory.free_bytes)} of memory are free",
                "free some, take a larger machine, or split the model (--engine tensor-parallel)",
            )
        return Plan(
            chosen, frozenset(), "on a CPU both sides stay where they are" if auto else reason
        )
    free_bytes = free_memory.free_bytes - live - int(free_memory.total_bytes * _SPARE)
    if free_bytes < 0:
        raise WeightsError(
            f"the live copy takes {format_bytes(live)}, and"
            f" {format_bytes(free_memory.free_bytes)} of device memory are free",
            "free some, take a larger device, or split the model (--engine tensor-parallel)",
        )
    if residency == "host":
        everything = frozenset(size.name for size in sizes)
        return Plan(chosen, everything, "auto is dense where residency is host" if auto else reason)
    if not auto and residency == "device":
        return Plan(chosen, frozenset(), reason)
    dense = sum(size.beside_bytes for size in sizes)
    free = f"{format_bytes(free_bytes)} are free beside the live copy"
    automatic = registry.automatic()
    estimates: dict[str, int] = {}
    for candidate in automatic if auto else (chosen,):
        taken = candidate.estimate(sizes)
        if taken is None:
            return Plan(candidate, frozenset(), reason)
        estimates[candidate.name] = taken
        if taken <= free_bytes:
            takes = f"takes {format_bytes(taken)}"
            if not candidate.keeps_sources:
                takes = f"takes about {format_bytes(taken)} where dense takes {format_bytes(dense)}"
            return Plan(candidate, frozenset(), f"{takes}, and {free}")
    takes = f"takes {format_bytes(estimates[chosen.name])}"
    if residency == "device":
        return Plan(chosen, frozenset(), f"{takes}, and {free}: it may not fit")
    for other in automatic[1:]:
        size = estimates.get(other.name) or other.estimate(sizes) or 0
        takes += f", {other.name} about {format_bytes(size)}"
    excess = estimates[chosen.name] - free_bytes
    host = _too_much(sizes, excess, estimates[chosen.name] / max(dense, 1))
    return Plan(chosen, host, f"{takes}, and {free}")


def _too_much(sizes: Iterable[TensorSize], excess: float, share: float) -> frozenset[str]:
    """The largest tensors, until the bytes that they take beside the live copy are more than
    `excess`."""
    host = []
    for size in sorted(sizes, key=lambda size: -size.beside_bytes):
        if excess <= 0:
            break
        host.append(size.name)
        excess -= size.beside_bytes * share
    return frozenset(host)

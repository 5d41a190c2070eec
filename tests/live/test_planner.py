"""What holds a delta: as asked for, or what fits; and pinned memory as a place for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pa_kernels import reference

import pa_fast
from pa_fast.errors import UsageError, WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.live.memory import FreeMemory
from pa_fast.live.placement import POOL_CHUNK_BYTES, PinnedPool, free_memory
from pa_fast.live.planner import plan
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.store import TensorSize as Size
from tests.stores import pairs

GB = 10**9


def sizes(rel: float = 0.02) -> list[Size]:
    """A model of 8 G weights in bf16, 16 GB, whose delta has that relative size."""
    g = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(1 << 16, generator=g)).bfloat16()
    instruct = (base.float() + 0.02 * rel * torch.randn(base.shape, generator=g)).bfloat16()
    return [Size(f"layer.{n}", GB, 2 * GB, (base, instruct)) for n in range(16)]


@pytest.mark.parametrize(
    ("free", "rel", "store", "hosted"),
    [
        (56, 0.02, "dense", 0),
        (52, 0.02, "packed", 0),
        (52, 0.2, "packed", 0),
        (45, 0.2, "packed", 0),
        (40, 0.2, "dense", 7),
        (28, 0.02, "dense", 13),
    ],
)
def test_auto_takes_dense_then_packed_then_dense_on_the_host(
    free: int, rel: float, store: str, hosted: int
) -> None:
    made = plan(sizes(rel), "auto", "auto", FreeMemory(free * GB, 80 * GB), allocated=False)
    assert made.store.name == store and made.store.lossless and made.store.exact
    assert len(made.host) == hosted
    assert "GB" in made.reason and made.reason in made.describe()


def test_what_was_asked_for_is_done() -> None:
    everything = {size.name for size in sizes()}
    for store in ("dense", "packed", "sparse", PackedStore(-0.5, 1.5)):
        assert plan(sizes(), store, "host", FreeMemory(30 * GB, 80 * GB)).host == everything
        made = plan(sizes(), store, "device", FreeMemory(30 * GB, 80 * GB))
        assert not made.host and made.store.name == (store if isinstance(store, str) else "packed")
    assert "may not fit" in plan(sizes(), "auto", "device", FreeMemory(10 * GB, 80 * GB)).reason
    some = plan(sizes(), "packed", "auto", FreeMemory(10 * GB, 80 * GB))
    assert some.store.name == "packed" and 0 < len(some.host) < 16
    assert (
        plan(sizes(), "auto", "auto", None).describe()
        == "dense: on a CPU both sides stay where they are"
    )


def test_a_live_copy_that_does_not_fit_is_refused_with_the_figures() -> None:
    with pytest.raises(WeightsError, match="16 GB, and 12 GB of device memory are free"):
        plan(sizes(), "auto", "auto", FreeMemory(12 * GB, 80 * GB), allocated=False)
    host = FreeMemory(17 * GB, 17 * GB, on_host=True)
    assert (
        plan(sizes(), "auto", "auto", host, allocated=False).store.name == "dense"
    )  # the sources are maps of files
    with pytest.raises(
        WeightsError,
        match=r"takes 16 GB and packed codes about [0-9.]+ GB, and 17 GB of memory are free",
    ):
        plan(sizes(), "packed", "auto", host, allocated=False)
    with pytest.raises(WeightsError, match="takes 16 GB, and 15 GB of memory are free"):
        plan(sizes(), "dense", "auto", FreeMemory(15 * GB, 15 * GB, on_host=True), allocated=False)
    with pytest.raises(UsageError, match="residency `disk`"):
        plan(sizes(), "auto", "disk", None)


@pytest.mark.parametrize("rel", [0.0018, 0.02, 0.2])
def test_the_estimate_is_near_what_encoding_takes(rel: float) -> None:
    base, instruct = pairs.pair(changed=1.0, rel=rel, shapes={"t": (1 << 20,)})
    source = Size("t", base["t"].nbytes, 2 * base["t"].nbytes, (base["t"], instruct["t"]))
    taken = sum(
        part.nbytes
        for e in PackedStore().encode(pairs.sources(base, instruct))
        for part in pairs.parts(e).values()
    )
    assert PackedStore().estimate([source]) == pytest.approx(taken, rel=0.03)
    assert PackedStore().estimate([Size("t", 8, 16)]) == 16


def test_an_arena_keeps_bits_and_alignment_in_chunks_of_powers_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pa_fast.live.placement.POOL_CHUNK_BYTES", 1 << 12)
    arena = PinnedPool(pinned=False)
    tensors = [
        torch.arange(n, dtype=dtype)
        for n in (0, 1, 7, 700, 5000)
        for dtype in (torch.bfloat16, torch.int32, torch.uint8)
    ]
    made = [arena.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, made):
        assert torch.equal(tensor, copy) and copy.dtype == tensor.dtype
        assert (
            copy.data_ptr() % 16 == 0 and copy.data_ptr() != tensor.data_ptr()
        ) or not tensor.numel()
        room = copy.untyped_storage().nbytes()
        assert room & (room - 1) == 0
    assert arena.copy(tensors[3]).data_ptr() == made[3].data_ptr()
    assert POOL_CHUNK_BYTES & (POOL_CHUNK_BYTES - 1) == 0


def test_on_a_cpu_every_residency_is_the_same() -> None:
    base, instruct = pairs.pair(changed=1.0, rel=0.02)
    for residency in ("auto", "device", "host"):
        live = pairs.live_like(base)
        weights = pa_fast.LiveWeights.bind(live, base, instruct, "auto", residency=residency)
        assert weights.plan is not None and not weights.plan.host
        weights.set_lambda(0.3)
        assert weights.verify()


@pytest.mark.gpu(only="pinned host memory")
@pytest.mark.parametrize("store", ["dense", "packed", "sparse"])
def test_sources_in_pinned_memory_give_the_same_bits(store: str) -> None:
    base, instruct = pairs.pair(changed=0.03 if store == "sparse" else 1.0, rel=0.02)
    live = pairs.live_like(base, device="cuda")
    weights = pa_fast.LiveWeights.bind(live, base, instruct, store, residency="host")
    memory = weights.memory()
    assert memory.device_bytes == 0 and memory.host_bytes > 0
    for lam in (0.3, 1.0, 0.7, 0.0):
        weights.set_lambda(lam)
        assert weights.verify()
        for name, tensor in live.items():
            assert torch.equal(
                as_integers(tensor.cpu()),
                as_integers(reference.lerp(base[name], instruct[name], lam)),
            )


@pytest.mark.parametrize("residency", ["auto", "device", "host"])
@pytest.mark.parametrize("free", [None, 28, 52, 80])
def test_a_store_that_nobody_named_was_not_asked_for(free: int | None, residency: str) -> None:
    room = None if free is None else FreeMemory(free * GB, 80 * GB)
    assert "as asked for" not in plan(sizes(), "auto", residency, room, allocated=False).describe()
    assert "as asked for" in plan(sizes(), "sparse", residency, room, allocated=False).describe()


def test_of_several_gpus_the_one_that_is_full_first_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"cuda:0": (10_000, 100_000), "cuda:1": (3_000, 100_000)}
    monkeypatch.setattr(FreeMemory, "of", lambda device: FreeMemory(*free[str(device)]))

    def live(device: str, size: int) -> Any:
        tensor = SimpleNamespace(
            device=torch.device(device),
            dtype=torch.bfloat16,
            numel=lambda: size,
            element_size=lambda: 2,
        )
        return SimpleNamespace(live=tensor)

    spread = [live("cuda:0", 500), live("cuda:1", 300), live("cuda:1", 200)]
    found = free_memory(spread)
    # each holds half: once 3,000 bytes lie on the second, 6,000 lie on both
    assert found == FreeMemory(6_000, 200_000)
    assert free_memory(spread[:1]) == FreeMemory(10_000, 100_000)
    assert free_memory([]) is None

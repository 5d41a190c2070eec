"""Which store holds a delta: the one that was asked for, by name or with its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pa_fast.delta.dense import DenseStore
from pa_fast.delta.entry import Store
from pa_fast.delta.lowrank_store import LowRankStore
from pa_fast.delta.packed_store import PackedStore
from pa_fast.delta.sparse_store import SparseStore
from pa_fast.errors import UsageError

STORES: dict[str, Callable[[], Store]] = {
    "auto": DenseStore,
    "dense": DenseStore,
    "packed": PackedStore,
    "sparse": SparseStore,
    "lowrank": LowRankStore,
    "attached": partial(LowRankStore, attached=True),
}


def planned(store: str | Store) -> Store:
    """The store of that name with its default options, or the one given; `auto` never picks a lossy one.

    Raises:
        UsageError: there is no such store.
    """
    if not isinstance(store, str):
        return store
    if store not in STORES:
        raise UsageError(f"store `{store}` is not available", f"available: {', '.join(STORES)}")
    return STORES[store]()

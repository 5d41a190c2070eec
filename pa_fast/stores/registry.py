"""The registry of stores, the one module that knows them by name and by type. A new store is one
class and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pa_fast.errors import UsageError
from pa_fast.stores.dense import DenseStore
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.sparse import SparseStore
from pa_fast.stores.store import Entry, Store

_CLASSES: tuple[type[Store], ...] = (DenseStore, PackedStore, SparseStore, LowRankStore)
STORES = {store.name: store for store in _CLASSES}
"""Every store, by name."""


def automatic() -> tuple[Store, ...]:
    """Return the stores that `auto` tries, in order: it takes the first that fits the device."""
    return DenseStore(), PackedStore()


def named(store: str | Store) -> Store:
    """Return the store of that name with its default options, or the one given. `auto` is the first
    store that it would try.

    Raises:
        UsageError: there is no such store.
    """
    if not isinstance(store, str):
        return store
    known: dict[str, Callable[[], Store]] = {
        "auto": DenseStore,
        **STORES,
        "attached": partial(LowRankStore, attached=True),
    }
    if store not in known:
        raise UsageError(f"store `{store}` is not available", f"available: {', '.join(known)}")
    return known[store]()


def encoding(format: str | Store, options: Mapping[str, Any]) -> Store:
    """Return the store to encode a delta with: that of the name with `options`, or the one given.

    Raises:
        UsageError: there is no such store, or it has no such option.
    """
    if isinstance(format, str) and format not in STORES:
        raise UsageError(f"format `{format}` is not available", f"available: {', '.join(STORES)}")
    takes = STORES[format].options if isinstance(format, str) else ()
    foreign = [name for name in options if name not in takes]
    if foreign:
        name = format if isinstance(format, str) else format.describe()
        raise UsageError(
            f"`{foreign[0]}` with format `{name}`",
            f"{name} takes {', '.join(takes) or 'no options'}",
        )
    return STORES[format].of_options(**options) if isinstance(format, str) else format


def owner(entry: Entry) -> type[Store]:
    """Return the store that an entry belongs to."""
    return next(store for store in STORES.values() if isinstance(entry, store.entry))


def kinds() -> dict[str, type[Store]]:
    """Return kind of entry in delta files → the store that it belongs to."""
    return {kind: store for store in STORES.values() for kind in store.kinds}

"""Which stores there are: the one place that knows them by name and by type. A new store is one
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
    """What `auto` takes: the first of them that fits the device."""
    return DenseStore(), PackedStore()


def named(store: str | Store) -> Store:
    """The store of that name with its default options, or the one given; `auto` is the first that
    it would take.

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
    """The store that a delta is encoded with: of that name with `options`, or the one given.

    Raises:
        UsageError: there is no such store, or an option is not one of its.
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
    """The store whose entry this is."""
    return next(store for store in STORES.values() if isinstance(entry, store.entry))


def kinds() -> dict[str, type[Store]]:
    """What delta files call entries → the store that they belong to."""
    return {kind: store for store in STORES.values() for kind in store.kinds}

"""A foreign object with a class of ours before its own."""

from __future__ import annotations

from typing import Any


def mixed(kind: type, thing: Any) -> Any:
    """`thing` as an object of its own class with `kind` before it; of the same name, because some
    ask for it."""
    own = type(thing)
    if issubclass(own, kind):
        return thing
    made: Any = object.__new__(type(own.__name__, (kind, own), {"__module__": own.__module__}))
    made.__dict__ = thing.__dict__
    return made

"""Triton's interpreter, quicker: the tests of kernel bodies spend half their time on a search that
finds the same each time."""

from __future__ import annotations

import importlib.util
import inspect
import types
from typing import Any


def find_members_once() -> None:
    """Let the interpreter look for the built-in functions of `triton.language` once a process.

    At every call of a function it goes through all members of four modules and classes, to replace
    those that are still Triton's own. They are replaced together and restored together: so the
    first of them says for all whether there is anything to do, and what there is never changes.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.language import core
    from triton.runtime import interpreter

    if interpreter.inspect is not inspect:
        return
    own: dict[Any, list[tuple[str, Any]]] = {}

    def getmembers(place: Any) -> list[tuple[str, Any]]:
        if place not in own:
            members = inspect.getmembers(place)
            own[place] = [(name, member) for name, member in members if core.is_builtin(member)]
        found = own[place]
        return found if found and getattr(place, found[0][0]) is found[0][1] else []

    interpreter.inspect = types.SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})

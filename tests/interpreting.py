"""Triton's interpreter, quicker: the tests of kernel bodies spend most of their time on what it
finds the same each time, or makes and never looks at."""

from __future__ import annotations

import importlib.util
import inspect
import types
from dataclasses import replace
from typing import Any


def make_quicker() -> None:
    """Let the interpreter of this process do less beside what kernels ask for. Values are the
    same."""
    if importlib.util.find_spec("triton") is None:
        return
    find_members_once()
    leave_out_what_nobody_reads()
    know_dtypes()


def find_members_once() -> None:
    """Let the interpreter look for the built-in functions of `triton.language` once a process.

    At every call of a function it goes through all members of four modules and classes, to replace
    those that are still Triton's own. They are replaced together and restored together: so the
    first of them says for all whether there is anything to do, and what there is never changes.
    """
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


def leave_out_what_nobody_reads() -> None:
    """Let the interpreter not widen every sum, difference and product of integers to 64 bits, to
    ask whether it overflows: without `debug` nobody reads the answer."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def know_dtypes() -> None:
    """Let the interpreter keep numpy's dtype of each of Triton's, rather than make a table of them
    all whenever it wants one."""
    from triton.language import core
    from triton.runtime import interpreter

    make, known = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_dtype(of: Any) -> Any:
        element = of.element_ty if isinstance(of, core.block_type) else of
        if isinstance(element, core.pointer_type):
            return make(element)
        if element.name not in known:
            known[element.name] = make(element)
        return known[element.name]

    interpreter._get_np_dtype = numpy_dtype

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
    replace_the_language_once()
    leave_out_what_nobody_reads()
    know_dtypes()
    know_shapes()


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


def replace_the_language_once() -> None:
    """Let a function that a kernel calls find `triton.language` as the kernel's launch left it: the
    interpreter replaces the same parts of it by the same again at every call."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    # what was put in the place of `range` says whether it is still there: a launch restores it
    ranges: dict[Any, Any] = {}
    of_functions: dict[Any, list[Any]] = {}

    def patch_once(fn: Any) -> Any:
        if fn not in of_functions:
            own = (interpreter.tl, interpreter.tl.core)
            found = [value for value in fn.__globals__.values() if any(value is one for one in own)]
            of_functions[fn] = found
        places = of_functions[fn]
        if places and all(ranges.get(place) is place.range for place in places):
            scope = getattr(interpreter, "_LangPatchScope", None)
            return scope and scope()
        made = patch(fn)
        ranges.update((place, place.range) for place in places)
        return made

    interpreter._patch_lang = patch_once


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


def know_shapes() -> None:
    """Let the interpreter keep what it makes of a shape, rather than make it anew for each value
    and its type. Where Triton has other attributes than these, it goes on as it is."""
    from triton.language import core

    begin, known = core.tensor.__init__, dict[tuple[Any, ...], tuple[Any, Any]]()
    of_other_elements = core.block_type.with_element_ty

    def __init__(self: Any, handle: Any, type: Any) -> None:
        dims = tuple(type.shape) if isinstance(type, core.block_type) else ()
        if dims in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known[dims]
            return
        begin(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            known[dims] = self.shape, self.numel

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        if vars(self).keys() != {"element_ty", "shape", "numel", "name"}:
            return of_other_elements(self, scalar_ty)
        made = object.__new__(core.block_type)
        made.element_ty, made.shape, made.numel = scalar_ty, self.shape, self.numel
        made.name = f"<{self.shape}, {scalar_ty}>"
        return made

    core.tensor.__init__ = __init__
    core.block_type.with_element_ty = with_element_ty

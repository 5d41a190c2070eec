"""Functions of the user's own, named `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import EvaluatorError, UsageError


@dataclass(frozen=True)
class Imported:
    """A function, its `module:name`, and the SHA-256 of its module's source (None where there is no
    file)."""

    target: str
    function: Callable[..., Any]
    sha256: str | None

    @property
    def name(self) -> str:
        return self.target.rpartition(":")[2]


def imported(target: str, option: str, expected: str) -> Imported:
    """Import `module:function` with the current directory on the path; `option` and `expected` are
    for error messages.

    Raises:
        UsageError: the target is not `module:function`.
        EvaluatorError: the module does not import, or has no such function.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UsageError(
            f"{option}: `{target}` is not module:function",
            "write for example my_package.scores:follow",
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise EvaluatorError(
            f"{option}: module `{module_name}` does not import: {type(error).__name__}: {error}",
            f"it is searched for in {os.getcwd()} first, then where Python looks",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "nothing" if function is None else f"a {type(function).__name__}"
        raise EvaluatorError(
            f"{option}: `{target}` is {found}, expected {expected}", "check its name"
        )
    source = getattr(module, "__file__", None)
    return Imported(
        target,
        function,
        hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest() if source else None,
    )

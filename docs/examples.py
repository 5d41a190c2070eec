"""Griffe extension: the lines of an `Example:` section are Python code."""

from __future__ import annotations

import re
from typing import Any

import griffe  # type: ignore[import-not-found, unused-ignore]

SECTION = re.compile(r"^Example:\n((?: {4}.*(?:\n|$)|\n(?= {4}))+)", re.MULTILINE)


class Examples(griffe.Extension):  # type: ignore[misc, unused-ignore]
    """Sets the lines of each `Example:` section as a code block."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(_code, obj.docstring.value)


def _code(section: re.Match[str]) -> str:
    return f"Example:\n    ```python\n{section[1].rstrip()}\n    ```\n\n"

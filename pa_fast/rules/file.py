"""YAML files of λ rules, read strictly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pa_fast.errors import UsageError
from pa_fast.rules.row import EXAMPLE, shown

LIMIT_BYTES = 1_000_000


def read(path: str | Path) -> list[Any]:
    """The rows in a YAML file, every scalar as the text that it is written as.

    Raises:
        UsageError: the file cannot be read, is no YAML, or has a key twice.
    """
    import yaml

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: the rule cannot be read: {error.strerror}", "give the path of a YAML file") from None
    if len(data) > LIMIT_BYTES:
        raise UsageError(f"{path}: {len(data)} bytes, expected a rule of at most {LIMIT_BYTES}", "give a rule file")
    try:
        tree = yaml.compose(data.decode("utf-8"), yaml.BaseLoader)
        _refuse_repeated(str(path), tree)
        # BaseLoader leaves every scalar as it is written: 0.1 is exact, and `no` is no bool
        rows = None if tree is None else yaml.load(data.decode("utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{path}: not YAML ({said})", f"write a list of rows, such as {EXAMPLE}") from None
    return rows if rows is not None else []


def _refuse_repeated(path: str, tree: Any) -> None:
    """Refuse a key that a mapping has twice, of which YAML would take the last, and aliases, which a rule has no use for."""
    seen: set[int] = set()
    nodes = [tree] if tree is not None else []
    while nodes:
        node = nodes.pop()
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise UsageError(f"{path}:{line}: found an alias", "write the row out")
        seen.add(id(node))
        if node.id == "mapping":
            keys = [key.value for key, _ in node.value if key.id == "scalar"]
            twice = next((key for key, count in Counter(keys).items() if count > 1), None)
            if twice is not None or len(keys) < len(node.value):
                found = f"{shown(twice)} is given twice" if twice is not None else "a key is no plain text"
                raise UsageError(f"{path}:{line}: {found}", "give each key once")
            nodes += [value for _, value in node.value]
        elif node.id == "sequence":
            nodes += node.value

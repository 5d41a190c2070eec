"""YAML files of λ rules, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pa_fast.errors import UsageError
from pa_fast.files import path_of
from pa_fast.foreign import YamlError, load_yaml
from pa_fast.rules.row import EXAMPLE

LIMIT_BYTES = 200_000  # PyYAML reads some 30 kB a second


def read(path: str | Path) -> list[Any]:
    """Read the rows in a YAML file, every scalar as the text that it is written as.

    Raises:
        UsageError: the file cannot be read, is not YAML, or has a key twice.
    """
    import yaml

    try:
        data = path_of(path, "rule").read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: the rule cannot be read: {error.strerror}", "give the path of a YAML file"
        ) from None
    if len(data) > LIMIT_BYTES:
        raise UsageError(
            f"{path}: {len(data)} bytes, expected a rule of at most {LIMIT_BYTES}",
            "give a rule file",
        )
    try:
        # BaseLoader leaves every scalar as it is written: 0.1 is exact, and `no` is no bool
        rows = load_yaml(data.decode("utf-8"), yaml.BaseLoader)
    except YamlError as error:
        if error.line is not None:
            raise UsageError(
                f"{path}:{error.line}: {error.message}", "write each row out, with each key once"
            ) from None
        raise UsageError(
            f"{path}: not YAML ({error.message})", f"write a list of rows, such as {EXAMPLE}"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not YAML ({error})", f"write a list of rows, such as {EXAMPLE}"
        ) from None
    return rows if rows is not None else []

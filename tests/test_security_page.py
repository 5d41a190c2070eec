"""docs/security.md promises nothing without a test: each that it names exists."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_each_test_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 20 and len(named) == page.count("::test_"), "each in the form `path::name`"
    for path, name in named:
        defined = [
            f.name
            for f in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        assert name in defined, f"{path}::{name}"


def test_each_row_of_the_page_has_a_test() -> None:
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not line.startswith(("| It cannot", "|---")):
            assert "::test_" in line, line

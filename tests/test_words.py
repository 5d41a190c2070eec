"""Names in the product are the field's own: none of those that were given up comes back."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
GIVEN_UP = {
    *("room", "arena", "ends", "prove", "first_write", "lanes", "place", "guard", "asked"),
    *("origins", "once", "drawn", "Mixed", "Whole", "HOLDERS", "Blend", "Recipe"),
    *("via", "over", "fed", "again", "about"),
}
"""A PyTorch engineer would have to ask what each of them is."""
NO_NOUNS = {"found", "made", "said", "left", "at"}
"""What a function keeps is called by the noun of what it holds."""


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is defined in `tree`: functions, classes, arguments and
    variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def locals_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of the arguments and variables of the functions of `tree`."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.arg):
                    yield node.lineno, node.arg
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.lineno, node.id


def given_up(source: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    return sorted(
        {(line, name) for line, name in names(tree) if name.strip("_") in GIVEN_UP}
        | {(line, name) for line, name in locals_of(tree) if name in NO_NOUNS}
    )


def test_no_name_that_was_given_up_is_in_the_product() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for root in ("pa_fast", "kernels/pa_kernels")
        for path in sorted((ROOT / root).rglob("*.py"))
        for line, name in given_up(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_one_that_comes_back_is_seen() -> None:
    source = (
        "class Mixed:\n    def _prove(self, via):\n        found = via\n        self.place = found"
    )
    assert given_up(source) == [(1, "Mixed"), (2, "_prove"), (2, "via"), (3, "found"), (4, "place")]
    assert given_up("class Rule:\n    def at(self, lam): ...") == []

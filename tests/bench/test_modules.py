"""Every module of the benchmarks imports: they run rarely, and a name that has moved would end a
run of half an hour."""

from __future__ import annotations

import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("bench", "bench/cpu", "bench/gpu")
    for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_it_imports(module: str) -> None:
    importlib.import_module(module)


def test_the_list_holds_every_stage() -> None:
    from bench.__main__ import NAMES

    assert {f"bench.cpu.{name}" for name in NAMES} <= set(MODULES)

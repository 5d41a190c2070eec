"""Shows the tables that a benchmark recorded, and gives pytest-benchmark an entry to keep them
in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from bench.cases import asked_size
from bench.machine import Machine
from bench.table import KEY, Table


@pytest.fixture(autouse=True)
def shown(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Print what a benchmark recorded, once it has passed or failed."""
    yield
    tables = benchmark.extra_info.get(KEY, [])
    with capsys.disabled():
        for table in tables:
            print(f"\n{Table.of(table).text()}")
    if tables and benchmark.enabled and benchmark.stats is None:
        # its file keeps extra_info of what was timed by it alone; the ways were timed in turn,
        # which it cannot do
        benchmark.pedantic(lambda: None, rounds=1)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No progress bars of transformers between the tables."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def pytest_benchmark_group_stats() -> list[tuple[str, list[Any]]]:
    """Nothing for pytest-benchmark to show: the tables are what there is to read."""
    return []


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Say where the figures come from, and what is not among them."""
    said: dict[str, list[Any]] = config.pluginmanager.getplugin("terminalreporter").stats
    output_json["run"] = {
        "machine": asdict(Machine.here()),
        "size": asked_size(),
        "failed": [one.nodeid for kind in ("failed", "error") for one in said.get(kind, [])],
        "skipped": {
            one.nodeid: one.longrepr[2]
            for one in said.get("skipped", [])
            if isinstance(one.longrepr, tuple)
        },
    }

"""What every test gets: `torch.empty` filled with poison, and kernel marks resolved by what the
machine has."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# how long an example takes says nothing on a busy machine
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

if os.environ.pop(
    "PYTEST_XDIST_WORKER", None
):  # out of the way of the pytest processes that tests start
    # A worker has a core to itself, and so have the processes that its tests start; read when torch
    # is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that wait do not spin on a core that another test needs
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreting import make_quicker

    make_quicker()


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Ctrl-C is what Python makes of it, also where the suite was started in the background of a
    script, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def drawn_where_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let figures be made and written, but not rendered, where the test is not marked `draws`: that
    takes half a second for each sweep."""
    if request.node.get_closest_marker("draws") is None:
        from pa_fast.sweep import figure

        unseen = {kind: figure._MARK.encode() for kind in figure.FORMATS}
        monkeypatch.setattr(figure, "_rendered", lambda drawing: unseen)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged during the test, by any logger. Pytest's own plugin for `caplog` looks through
    every logger of every library three times a test."""
    collector, root = _Collector(), logging.getLogger()
    apart = [
        one
        for one in root.manager.loggerDict.values()
        if isinstance(one, logging.Logger) and not one.propagate
    ]
    for logger in (root, *apart):
        logger.addHandler(collector)
    yield collector.records
    for logger in (root, *apart):
        logger.removeHandler(collector)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The compiled loops that this process has: none, until something puts them there."""
    from pa_kernels import compiled

    has: list[compiled.Loops] = []
    monkeypatch.setattr(compiled, "_ready", has)
    return has


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and `torch.empty_like` return, so that a lane nobody wrote fails a
    comparison."""
    import torch

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if (
                tensor.device.type == "meta"
                or tensor.layout != torch.strided
                or not tensor.is_contiguous()
            ):
                return tensor
            with torch.no_grad():
                plain = tensor.detach()
                if plain.dtype.is_floating_point:
                    plain.fill_(float("nan"))
                elif plain.numel() and not plain.dtype.is_complex:
                    plain.view(torch.uint8).fill_(1 if plain.dtype == torch.bool else 0xA5)
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def pytest_collection_finish() -> None:
    """Keep what has been imported and collected out of every later search for garbage."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [
        item
        for item in items
        if item.get_closest_marker("gpu") or item.get_closest_marker("triton")
    ]
    if not marked:
        return
    import torch

    gpu = torch.cuda.is_available()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    shimmed = config.pluginmanager.hasplugin("tests.without_gpu")
    for item in marked:
        mark = item.get_closest_marker("gpu")
        if mark and shimmed and "only" in mark.kwargs:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {mark.kwargs['only']}"))
        elif mark and not shimmed and (not gpu or interpreted):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.get_closest_marker("triton") and not gpu and not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device or TRITON_INTERPRET=1"))

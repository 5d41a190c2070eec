"""Full precision for every thread that asks, and what was allowed before once the last one has
left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from pa_kernels import precision
from pa_kernels.precision import full_precision


@pytest.fixture(autouse=True)
def short_factors() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def error() -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 128, generator=generator), torch.randn(128, 64, generator=generator)
    return float((a @ b - a.double() @ b.double()).abs().max())


def test_products_keep_their_bits_within_it_only() -> None:
    before, outside = precision._allowed(), error()
    with full_precision():
        assert error() < 1e-4
        with full_precision():
            pass
        assert error() < 1e-4
    assert precision._allowed() == before
    assert error() == outside


def test_a_thread_that_leaves_first_changes_nothing_for_the_others() -> None:
    before = precision._allowed()
    inside, go = threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision():
            inside.set()
            go.wait()

    thread = threading.Thread(target=stay)
    with full_precision():
        thread.start()
        inside.wait()
    try:
        assert error() < 1e-4
    finally:
        go.set()
        thread.join()
    assert precision._allowed() == before


def test_an_error_within_it_restores_too() -> None:
    before = precision._allowed()
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert precision._allowed() == before


def test_a_torch_that_knows_one_word_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPU", None)
    monkeypatch.setattr(precision, "_FULL", "highest")
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert error() < 1e-4
    assert torch.get_float32_matmul_precision() == "medium"

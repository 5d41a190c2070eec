"""Pieces over cores: all of them, in order, and errors that are not swallowed."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from pa_kernels import cores
from pa_kernels.cores import over_cores


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_results_come_in_order_and_the_thread_count_is_restored(count: int) -> None:
    before = torch.get_num_threads()
    assert over_cores(lambda k: k * k, range(count)) == [k * k for k in range(count)]
    assert torch.get_num_threads() == before


def test_every_worker_runs_torch_on_one_core() -> None:
    def seen(_: int) -> tuple[int, int]:
        time.sleep(0.01)
        return threading.get_ident(), torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = over_cores(seen, range(8))
    finally:
        torch.set_num_threads(before)
    assert {threads for _, threads in found} == {1}
    assert len({ident for ident, _ in found}) == 2


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt])
def test_an_error_ends_the_work_and_is_raised(error: type[BaseException]) -> None:
    started = []

    def work(k: int) -> None:
        started.append(k)
        time.sleep(0.001)
        if k == 3:
            raise error("piece 3")

    before = torch.get_num_threads()
    with pytest.raises(error, match="piece 3"):
        over_cores(work, range(1000))
    assert len(started) < 100
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_workers_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        over_cores(lambda k: k, range(4))
        child = os.fork()
        if child == 0:
            ended = over_cores(lambda k: k, range(4)) == [0, 1, 2, 3]
            os._exit(0 if ended else 1)
        deadline = time.monotonic() + 30
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        if found == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert found == (child, 0)
    finally:
        torch.set_num_threads(before)


def test_workers_do_not_inherit_flushed_denormals() -> None:
    before = torch.get_num_threads()
    cores._helpers.cache_clear()
    torch.set_num_threads(2)
    try:
        torch.set_flush_denormal(True)
        over_cores(lambda k: time.sleep(0.01), range(4))
        torch.set_flush_denormal(False)
        tiny = torch.full((8,), 1e-39)

        def kept(_: int) -> bool:
            time.sleep(0.01)
            return bool(((tiny * 0.5) > 0).all())

        assert all(over_cores(kept, range(8)))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)

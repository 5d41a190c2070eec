"""Pieces over cores: all of them, in order, and errors that are not swallowed."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pa_kernels import cores
from pa_kernels.cores import over_cores

from tests.interrupting import interrupted_at


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


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def ends(work: Callable[[], object], within_s: float = 60.0) -> bool:
    """Whether `work` ends at all, in a thread that the test can leave behind."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(within_s)
    return not thread.is_alive()


@pytest.mark.usefixtures("two_threads")
def test_nested_work_ends_where_torch_cannot_set_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in vLLM's CPU worker, which makes `torch.set_num_threads` a no-op."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    cores._helpers.cache_clear()
    found: list[list[int]] = []

    def outer(k: int) -> int:
        time.sleep(0.01)
        return sum(over_cores(lambda j: k * j, range(8)))

    assert ends(lambda: found.append(over_cores(outer, range(8))))
    assert found == [[28 * k for k in range(8)]]
    cores._helpers.cache_clear()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("interrupted", ["end", "sleep"])
def test_what_an_interrupt_leaves_at_work_ends_before_anything_else_starts(
    interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in the work, and another one wherever the first one led: at the first line of
    the clean-up, or in its wait."""
    release, working = threading.Event(), threading.Event()
    events: list[str] = []
    main = threading.get_ident()

    def work(k: int) -> None:
        if threading.get_ident() == main:
            assert working.wait(60)
            raise KeyboardInterrupt
        working.set()
        release.wait(60)
        events.append("the old helper wrote")

    def interrupt(*_: object) -> None:
        release.set()
        patched.undo()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if interrupted == "end":
            patched.setattr(cores, "_end", interrupt)
        else:
            patched.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            over_cores(work, range(2))
    assert torch.get_num_threads() == 2
    assert over_cores(lambda k: events.append("new work"), range(1)) == [None]
    assert events[-1] == "new work"
    assert cores._jobs == []


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threads", ["old", "new"])
def test_an_interrupt_anywhere_leaves_nothing_locked(threads: str) -> None:
    def stuck(*_: object) -> None:
        raise TimeoutError("waits for what an interrupt left locked")

    before = signal.signal(signal.SIGALRM, stuck)
    found: list[int] = []
    try:
        for event in itertools.count(1):
            if threads == "new":
                cores._helpers.cache_clear()
            reached = interrupted_at(
                event, lambda: over_cores(lambda k: time.sleep(1e-4), range(4))
            )
            signal.alarm(30)
            for _ in range(2):
                assert over_cores(lambda k: found.append(k), range(8)) == [None] * 8, event
            signal.alarm(0)
            assert sorted(found) == sorted([*range(8)] * 2), event
            assert torch.get_num_threads() == 2 and cores._jobs == [], event
            found.clear()
            if not reached:
                break
        assert event > 20
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("two_threads")
def test_another_threads_work_is_waited_for_once_it_was_abandoned_and_not_before() -> None:
    working, release = threading.Event(), threading.Event()

    def slow(k: int) -> None:
        working.set()
        release.wait(60)

    other = threading.Thread(target=lambda: over_cores(slow, range(2)), daemon=True)
    other.start()
    assert working.wait(60)
    assert ends(lambda: over_cores(lambda k: k, range(1)))  # while the other one is still at work
    release.set()
    other.join(60)
    assert cores._jobs == []


def test_threads_have_ended_when_their_block_was_left_by_two_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, started = threading.Event(), threading.Event()
    shutdown = ThreadPoolExecutor.shutdown
    interrupts = [KeyboardInterrupt()]

    def once_interrupted(
        pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False
    ) -> None:
        if interrupts:
            raise interrupts.pop()
        shutdown(pool, wait, cancel_futures=cancel_futures)

    def work() -> None:
        started.set()
        time.sleep(0.1)
        ended.set()

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", once_interrupted)
    never = []
    with pytest.raises(KeyboardInterrupt), cores.threads(1) as pool:
        pool.submit(work)
        pool.submit(never.append, 1)
        assert started.wait(60)
        raise KeyboardInterrupt
    assert ended.is_set()
    assert not never

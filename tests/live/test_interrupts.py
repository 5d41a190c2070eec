"""Interrupts, threads and signal handlers that call `set_lambda`: whatever they do, no λ is set
that the weights do not hold."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.errors import WeightsError
from tests.interrupting import interrupted_at

SWITCHES = [pytest.param(12), pytest.param(340, marks=pytest.mark.slow)]
"""Interrupted switches of each store and number of interrupts: 2,040 in all with `make
test-slow`."""

PAIRS = [pytest.param(12), pytest.param(67, marks=pytest.mark.slow)]
"""Switches that two threads make at once, of each store: 201."""

STORES = {"dense": "dense", "packed": "packed", "sparse": "sparse"}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Held:
    """Live weights of some store over tensors of several pieces each, so that helpers write to
    them."""

    def __init__(self, store: str):
        g = torch.Generator().manual_seed(0)
        sizes = {"big": 1_500_001, "small": 1_000, "other": 700_000}
        self.base = {
            name: torch.randn(size, generator=g).bfloat16() for name, size in sizes.items()
        }
        self.instruct = {
            name: torch.where(
                torch.rand(t.shape, generator=g) < 0.02,
                t + 0.05 * torch.randn(t.shape, generator=g).bfloat16(),
                t,
            )
            for name, t in self.base.items()
        }
        self.live = {name: torch.empty_like(t) for name, t in self.base.items()}
        self.weights = pa_fast.LiveWeights.bind(self.live, self.base, self.instruct, store=store)

    def is_right(self) -> bool:
        """Whether the live tensors are the merge at the λ that is set."""
        lam = self.weights.lam
        assert lam is not None
        return all(
            torch.equal(self.live[name], torch.lerp(b, i, lam))
            for (name, b), i in zip(self.base.items(), self.instruct.values())
        )

    def switch_s(self) -> float:
        """Seconds that a switch takes here, the least of a few."""
        times = []
        for lam in (0.2, 0.6, 0.3):
            start = time.perf_counter()
            self.weights.set_lambda(lam)
            times.append(time.perf_counter() - start)
        return min(times)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("store", STORES.values(), ids=list(STORES))
def test_after_interrupts_the_next_switch_is_right_and_all_threads_are_back(
    store: str, count: int, switches: int
) -> None:
    held = Held(store)
    draw, switch_s = random.Random(f"{store} {count}"), held.switch_s()
    left, interrupted = 0, 0

    def strike(*_: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for k in range(20 * switches):
            if k >= switches and interrupted > switches // 4:
                break  # a busy machine strikes late, and more are needed
            lam, then = (0.1 + 0.8 * draw.random() for _ in range(2))
            try:
                try:
                    left = count
                    first_s = draw.uniform(1e-5, 1.1 * switch_s)
                    # the interval timer strikes again and again; two are let through
                    signal.setitimer(
                        signal.ITIMER_REAL, first_s, draw.choice([2e-4, 1e-3]) if count == 2 else 0
                    )
                    held.weights.set_lambda(lam)
                except KeyboardInterrupt:
                    pass  # here Python 3.10 may raise the second
            except KeyboardInterrupt:
                pass
            interrupted += left < count
            left = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.get_num_threads() == 2, k
            assert torch.is_grad_enabled(), k
            assert not torch.is_inference_mode_enabled(), k
            if held.weights.lam is not None:
                assert held.is_right(), k
            held.weights.set_lambda(then)
            assert held.weights.lam == then
            assert held.is_right(), k
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > switches // 4


def test_a_lock_that_an_interrupted_call_has_left_taken_is_given_back() -> None:
    held = Held("dense")
    held.weights._lock.acquire()  # as Python 3.10 leaves it after two interrupts at once
    held.weights.set_lambda(0.4)
    assert held.is_right() and not held.weights._lock._is_owned()


@pytest.mark.parametrize(
    ("store", "step"),
    [
        *(("dense", 83), ("sparse", 13), ("packed", 97)),
        *(pytest.param(store, 1, marks=pytest.mark.slow) for store in STORES.values()),
    ],
)
def test_an_interrupt_anywhere_in_a_switch_leaves_the_next_one_right(store: str, step: int) -> None:
    held = Held(store)
    lams = itertools.cycle((0.2, 0.9, 0.4))
    for event in itertools.count(1, step):
        reached = interrupted_at(event, lambda: held.weights.set_lambda(next(lams)))
        assert held.weights.lam is None or held.is_right(), event
        held.weights.set_lambda(next(lams))
        assert held.is_right() and torch.get_num_threads() == 2, event
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), event
        if not reached:
            break
    assert event > 50


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("store", STORES.values(), ids=list(STORES))
def test_two_threads_that_set_lambda_leave_one_of_the_two(store: str, pairs: int) -> None:
    held = Held(store)
    draw = random.Random(store)
    for k in range(pairs):
        lams = [draw.random(), draw.random()]
        barrier = threading.Barrier(2)
        errors: list[BaseException] = []

        def switch(
            lam: float, barrier: threading.Barrier = barrier, errors: list[BaseException] = errors
        ) -> None:
            barrier.wait()
            try:
                held.weights.set_lambda(lam)
                held.weights.checksum()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=switch, args=(lam,)) for lam in lams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, k
        assert held.weights.lam in lams
        assert held.is_right(), k
    held.weights.set_lambda(0.4)
    assert held.is_right()
    assert held.weights.verify()


def test_a_thread_that_proves_waits_for_one_that_switches() -> None:
    held = Held("dense")
    wrong: list[Any] = []

    def prove() -> None:
        for _ in range(12):
            wrong.extend(held.weights.changed())
            # a lock is not fair: one that is taken again at once is never the other thread's
            time.sleep(1e-3)

    prover = threading.Thread(target=prove)
    prover.start()
    for lam in itertools.islice(itertools.cycle((0.2, 0.7)), 12):
        held.weights.set_lambda(lam)
    prover.join()
    assert wrong == []


@pytest.mark.parametrize("store", STORES.values(), ids=list(STORES))
def test_a_signal_handler_that_sets_lambda_within_a_switch_is_refused(store: str) -> None:
    held = Held(store)
    switch_s = held.switch_s()
    refused = done = 0
    nested = False

    def strike(*_: Any) -> None:
        nonlocal refused, done
        if nested:
            try:
                held.weights.set_lambda(0.9)
                done += 1
            except WeightsError as error:
                assert "the same thread" in error.message
                refused += 1

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for k in range(12):
            held.weights.set_lambda(0.2)
            try:
                nested = True
                signal.setitimer(signal.ITIMER_REAL, switch_s * (k % 6 + 0.5) / 6)
                held.weights.set_lambda(0.5)
            finally:
                nested = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert held.weights.lam is not None
            assert held.is_right(), k
    finally:
        signal.signal(signal.SIGALRM, before)
    assert refused

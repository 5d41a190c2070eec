"""CPU work cut into pieces, one core each."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")

MOST = 16
"""More threads would only wait for memory, and each may hold scratch."""


def _one_core() -> None:
    torch.get_num_threads()  # torch takes the process's count over when a thread first asks, which would undo the next line
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a thread inherits the mode of its maker, and may outlive it


@contextmanager
def one_core() -> Iterator[None]:
    """This thread's torch operations on one core, for results whose bits may depend on how an operation is split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def cores(shared_by: int = 1) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, divided by `shared_by`, each of them running its torch operations on one core.

    Pieces are small: threads that each take a whole piece wait for nobody, where torch's own split waits for all its
    threads at the end of every operation, and stalls on a machine that has other work.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max(1, min(threads, MOST) // shared_by), initializer=_one_core) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def over_cores(work: Callable[[A], T], pieces: Iterable[A]) -> list[T]:
    """`work` of every piece, in order. The calling thread is one of the workers: a thread that only waits would cost the
    others 3 % of a memory-bound pass. The first error ends it and is raised."""
    pieces = list(pieces)
    threads = torch.get_num_threads()
    helpers = min(threads, MOST, len(pieces)) - 1
    if helpers < 1:
        return [work(piece) for piece in pieces]
    left = deque(range(len(pieces)))
    done: dict[int, T] = {}

    def drain() -> None:
        while True:
            try:
                k = left.popleft()
            except IndexError:
                return
            try:
                done[k] = work(pieces[k])
            except BaseException:
                left.clear()
                raise

    pool = _helpers(min(threads, MOST) - 1)
    others = [pool.submit(drain) for _ in range(helpers)]
    try:
        torch.set_num_threads(1)
        drain()
    finally:
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()
    return [done[k] for k in range(len(pieces))]


def over(work: Callable[[A], T], pieces: Iterable[A], like: torch.Tensor) -> list[T]:
    """`work` of every piece, in order: over cores where `like` is on the CPU, else one after another."""
    return over_cores(work, pieces) if like.device.type == "cpu" else [work(piece) for piece in pieces]


@functools.cache
def _helpers(count: int) -> ThreadPoolExecutor:
    """Threads that stay: new ones start on the core of the thread that made them, and lose 7 ms until they are moved."""
    return ThreadPoolExecutor(count, "pa_kernels", initializer=_one_core)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not survive a fork

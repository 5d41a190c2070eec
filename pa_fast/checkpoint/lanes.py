"""Several files filled at once, each by threads of its own.

A file system lets one thread at a time write to a file: threads that fill one together wait for
each other. 2 GB of new pages, 2 cores: 3.1 s by two threads into one file after another, 1.6 s by
one thread each into two files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TypeVar

A = TypeVar("A")
T = TypeVar("T")


def side_by_side(
    work: Callable[[ThreadPoolExecutor, A], T],
    items: Sequence[A],
    at_once: int,
    ended: threading.Event,
) -> list[T]:
    """`work(pool, item)` of every item, in order; `at_once` of them at a time, each with its share
    of the cores.

    Args:
        ended: set when an item fails or the caller is interrupted. Work that goes on must look at
            it, and raise.

    Raises:
        what the first item that failed by itself raised, once all have ended.
    """
    from pa_kernels.cores import cores, threads

    if at_once < 2:
        with cores() as pool:
            return [work(pool, item) for item in items]
    left, done = deque(enumerate(items)), dict[int, T]()
    failed: list[BaseException] = []

    def lane(pool: ThreadPoolExecutor) -> None:
        while left and not ended.is_set():
            try:
                k, item = left.popleft()
                done[k] = work(pool, item)
            except BaseException as error:
                failed.append(error)
                ended.set()

    with ExitStack() as stack:
        pools = [stack.enter_context(cores(at_once)) for _ in range(at_once)]
        lanes = stack.enter_context(threads(at_once))
        stack.callback(ended.set)  # an interrupt of the wait
        wait([lanes.submit(lane, pool) for pool in pools])
    if failed:
        raise failed[0]
    return [done[k] for k in range(len(items))]

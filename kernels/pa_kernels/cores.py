"""CPU work cut into pieces, one core each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")

MOST = 16
"""More threads would only wait for memory, and each may hold scratch."""


@contextmanager
def cores() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, each of them running its torch operations on one core.

    Pieces are small: threads that each take a whole piece wait for nobody, where torch's own split waits for all its
    threads at the end of every operation, and stalls on a machine that has other work.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, MOST), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def over_cores(work: Callable[[A], T], pieces: Iterable[A]) -> list[T]:
    """`work` of every piece, in order; without threads where there is one piece or one core."""
    pieces = list(pieces)
    if len(pieces) < 2 or torch.get_num_threads() == 1:
        return [work(piece) for piece in pieces]
    with cores() as pool:
        return list(pool.map(work, pieces))

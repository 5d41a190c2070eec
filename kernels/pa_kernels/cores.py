"""CPU work cut into pieces, one core each, and the memory that each thread keeps for them."""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")

MOST = 16
"""More threads would only wait for memory, and each may hold scratch."""


class _Here(threading.local):
    """The state of one thread.

    Attributes:
        inside: this thread is in `over_cores`, or works on a piece of it: what it calls from there
            runs in this thread alone. torch's own count cannot say so where `torch.set_num_threads`
            does nothing, as in vLLM's CPU worker.
    """

    inside = False


_here = _Here()


class _Job:
    """Pieces that several threads take from, until none is left or the job is closed.

    `take_part` may start in a helper at any time, also after the job has ended: it then does
    nothing. Only atomic operations on plain attributes are used, so that an interrupt between any
    two of them leaves the job in a state that `end` can end.
    """

    def __init__(self, work: Callable[[Any], Any], pieces: Sequence[Any]):
        self.owner = threading.get_ident()
        self.closed = False
        self.done: dict[int, Any] = {}
        self.errors: list[BaseException] = []
        self._work, self._pieces = work, pieces
        self._remaining = deque(range(len(pieces)))
        self._active: list[None] = []

    def drain(self) -> None:
        """Work on pieces until none is left; an error ends the job and is raised."""
        was, _here.inside = _here.inside, True
        try:
            while not self.closed:
                try:
                    k = self._remaining.popleft()
                except IndexError:
                    return
                self.done[k] = self._work(self._pieces[k])
        except BaseException:
            self.closed = True
            raise
        finally:
            _here.inside = was

    def take_part(self) -> None:
        """`drain`, in a helper."""
        # before `closed` is read: `end` sets that first, and then looks here
        self._active.append(None)
        try:
            self.drain()
        except BaseException as error:
            self.errors.append(error)
        finally:
            self._active.pop()

    def end(self) -> None:
        """Let no helper start another piece, and return once none works on one: at most a piece
        later.

        An interrupt meanwhile is raised at the end: until then a helper may write, and nothing else
        may start.
        """
        raised: BaseException | None = None
        while True:
            try:
                self.closed = True
                while self._active:
                    time.sleep(_POLL_S)
                break
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised


_jobs: list[_Job] = []
"""Jobs that have begun, and of which it is not known that all helpers have ended."""

_POLL_S = 5e-5


def settle() -> None:
    """Wait for helpers that an interrupted call has left at work.

    Called before anything is read or written: a second interrupt can leave `over_cores` at any
    line, `finally` included.
    """
    if _here.inside:
        return
    me = threading.get_ident()
    for job in list(_jobs):
        if job.closed or job.owner == me:
            # one that another thread still works on is none of our business
            _end(job)


def _end(job: _Job) -> None:
    job.end()
    with contextlib.suppress(ValueError):  # another thread, in `settle`, was quicker
        _jobs.remove(job)


def _leave(job: _Job, count: int) -> None:
    """End `job` and give this thread its state and its `count` of torch threads back; a second call
    finds nothing left to do."""
    try:
        job.closed = True
        _end(job)
    finally:
        _here.inside = False
        torch.set_num_threads(count)


def _one_core() -> None:
    # torch takes the process's count over when a thread first asks, which would undo the next line
    torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a thread inherits the mode of its maker, and may outlive it


def inference() -> AbstractContextManager[None]:
    """`torch.inference_mode()` that an interrupt cannot leave on: entered and left by C alone, with
    no line of Python within which it could come. torch's own class leaves by a method in Python;
    skipped, the mode stays on for the whole thread.
    """
    return torch._C._InferenceMode(True)


@contextmanager
def one_core() -> Iterator[None]:
    """This thread's torch operations on one core, for results whose bits may depend on how an
    operation is split."""
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def cores(shared_by: int = 1) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, divided by `shared_by`, each of them running its torch
    operations on one core.

    Pieces are small: threads that each take a whole piece wait for nobody, where torch's own split
    waits for all its threads at the end of every operation, and stalls on a machine that has other
    work.
    """
    count = torch.get_num_threads()
    try:
        with threads(max(1, min(count, MOST) // shared_by), initializer=_one_core) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


@contextmanager
def threads(count: int, **options: Any) -> Iterator[ThreadPoolExecutor]:
    """A `ThreadPoolExecutor` of `count` threads that is left once all of them have ended, whatever
    interrupts come.

    Its own context manager is left by a second interrupt while threads go on working. An error
    starts nothing that waits.
    """
    pool = ThreadPoolExecutor(count, **options)
    try:
        yield pool
    except BaseException:
        _shut(pool, cancel=True)
        raise
    _shut(pool, cancel=False)


def _shut(pool: ThreadPoolExecutor, *, cancel: bool) -> None:
    """Shut `pool` down and wait until its threads have ended; an interrupt meanwhile cancels the
    rest, and is raised then."""
    raised: BaseException | None = None
    while True:
        try:
            pool.shutdown(wait=True, cancel_futures=cancel or raised is not None)
            break
        except BaseException as error:
            raised = raised or error
    if raised is not None:
        raise raised


def over_cores(work: Callable[[A], T], pieces: Iterable[A]) -> list[T]:
    """`work` of every piece, in order. The calling thread is one of the workers: a thread that only
    waits would cost the others 3 % of a memory-bound pass. The first error ends it and is raised,
    once no helper works on a piece any more.

    Called from within a piece, it does its own pieces one after another, in the same thread."""
    pieces = list(pieces)
    if _here.inside:
        return [work(piece) for piece in pieces]
    settle()
    count = torch.get_num_threads()
    helpers = min(count, MOST, len(pieces)) - 1
    if helpers < 1:
        return [work(piece) for piece in pieces]
    pool = _helpers(min(count, MOST) - 1)
    job = _Job(work, pieces)
    _jobs.append(job)
    # an interrupt may come in each `finally`; between entering one and the end of its first call
    # there is no place for one, but in Python 3.10 as the first `finally` is entered
    try:
        try:
            _here.inside = (
                True  # what a signal handler calls from here on runs in this thread alone
            )
            for _ in range(helpers):
                pool.put(job)
            torch.set_num_threads(1)
            job.drain()
        finally:
            _leave(job, count)
    finally:
        _leave(job, count)
    if job.errors:
        raise job.errors[0]
    return [job.done[k] for k in range(len(pieces))]


def pieces(size: int, step: int) -> Iterator[slice]:
    """Slices of `step` elements, the last one shorter, that cover `size`."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def parallel_map(work: Callable[[A], T], pieces: Iterable[A], like: torch.Tensor) -> list[T]:
    """`work` of every piece, in order: over cores where `like` is on the CPU, else one after
    another."""
    return (
        over_cores(work, pieces) if like.device.type == "cpu" else [work(piece) for piece in pieces]
    )


class Scratch(threading.local):
    """Memory of a CPU by use (`base`, `out`, …), one set per thread, kept from piece to piece:
    fresh memory costs more to touch than to use.

    Cost: the largest piece of each use, per thread.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for `count` elements of `dtype` [count], its contents undefined, overwritten by
        the thread's next `take` for that use; no inference tensor, whatever the mode."""
        size = count * dtype.itemsize
        kept = self._kept.get(use)
        if kept is None or kept.nbytes < size:
            with torch.inference_mode(False):
                kept = self._kept[use] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return kept[:size].view(dtype)


@functools.cache
def _helpers(count: int) -> SimpleQueue[_Job]:
    """Return the queue of `count` threads that take part in the jobs put there.

    They stay: new ones start on the core of the thread that made them, and lose 7 ms until they are
    moved. No lock of Python's own library is behind this: an interrupt that comes as one is taken
    (in `ThreadPoolExecutor.submit`, `Thread.start`) leaves it locked for good, and whoever takes it
    next waits for ever.
    """
    jobs: SimpleQueue[_Job] = SimpleQueue()
    for _ in range(count):
        _thread.start_new_thread(_help, (jobs,))
    return jobs


def _help(jobs: SimpleQueue[_Job]) -> None:
    _one_core()
    while True:
        job = jobs.get()
        job.take_part()
        del job  # while it waits for the next, nothing of this one stays in memory


def _forget() -> None:
    """In a forked child, which has none of the parent's threads."""
    _helpers.cache_clear()
    _jobs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

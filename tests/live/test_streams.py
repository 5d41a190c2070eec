"""The order of work on live tensors, on streams that record what they are asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pa_fast.live.streams import StreamOrder


class FakeStream:
    """A queue of a device: work, events recorded on it, and what it waits for before it goes on."""

    def __init__(self, name: str, done: list[str]):
        self.name, self.queue, self._done = name, [], done  # type: ignore[var-annotated]

    def run(self, work: str) -> None:
        self.queue.append(("work", work))

    def record_event(self) -> tuple[FakeStream, int]:
        self.queue.append(("event", len(self.queue)))
        return self, len(self.queue)

    def wait_event(self, event: tuple[FakeStream, int]) -> None:
        self.queue.append(("wait", event))

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


class FakeGpu:
    """A device that runs its streams as late as their waits allow, one chosen stream first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.done: list[str] = []
        self.streams = [FakeStream(name, self.done) for name in ("default", "a", "b")]
        self.current = self.streams[0]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda _: self.streams[0])

    @contextlib.contextmanager
    def on(self, k: int) -> Iterator[FakeStream]:
        before, self.current = self.current, self.streams[k]
        yield self.current
        self.current = before

    def finish(self, first: int) -> list[str]:
        """Run everything, `streams[first]` whenever it can; return the order of the work."""
        at = {stream.name: 0 for stream in self.streams}
        order = [self.streams[first], *(s for s in self.streams if s is not self.streams[first])]
        while True:
            for stream in order:
                if at[stream.name] == len(stream.queue):
                    continue
                kind, what = stream.queue[at[stream.name]]
                if kind == "wait" and at[what[0].name] < what[1]:
                    continue
                at[stream.name] += 1
                if kind == "work":
                    self.done.append(what)
                break
            else:
                assert all(at[s.name] == len(s.queue) for s in self.streams), "a wait for ever"
                return self.done


@pytest.mark.parametrize("first", [0, 1, 2])
def test_switches_and_forward_passes_run_in_the_order_of_their_calls(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    order = StreamOrder([torch.device("cuda:0"), torch.device("cpu"), torch.device("cuda:0")])
    called: list[str] = []

    def queued(stream: Any, work: str) -> None:
        called.append(work)
        stream.run(work)

    for n, k in enumerate((0, 1, 1, 2, 0, 2, 1)):
        with gpu.on(k) as stream, order.ordered():
            queued(stream, f"switch {n}")
        queued(gpu.streams[0], f"forward {n}")
    assert gpu.finish(first) == called


def test_without_order_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake would notice."""
    gpu = FakeGpu(monkeypatch)
    gpu.streams[0].run("forward")
    with gpu.on(1) as stream, StreamOrder([torch.device("cpu")]).ordered():
        stream.run("switch")
    assert gpu.finish(1) == ["switch", "forward"]


def test_the_next_work_waits_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    order = StreamOrder([torch.device("cuda:0")])
    with pytest.raises(RuntimeError), gpu.on(1) as stream, order.ordered():
        stream.run("half a switch")
        raise RuntimeError
    gpu.streams[0].run("forward")
    assert gpu.finish(0) == ["half a switch", "forward"]

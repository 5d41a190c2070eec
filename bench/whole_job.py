"""Where the time of a whole job goes: load, first switch, then a sweep, part by part: `python -m
bench.whole_job --size 1b`.

Every part is timed in the thread that calls it, less the parts inside it, so that the rows add up
to the whole. What this prints is a profile of one run, not a benchmark: nothing is repeated.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pa_fast
from bench.synthetic import pair_of
from bench.test_sweep import Likelihood

PARTS = (
    ("transformers makes the two modules", "pa_fast.engines.loading", "_from_pretrained"),
    (
        "first write: sources checked, both ends written and compared",
        "pa_fast.live.endpoints",
        "InitialWrite.write_",
    ),
    ("switch", "pa_fast.stores.composite", "CompositeStore.set_"),
    ("proof: a fresh merge beside the live copy", "pa_fast.live.weights", "LiveWeights.changed"),
    ("proof: checksums", "pa_fast.live.weights", "LiveWeights.checksum"),
    ("effective λ", "pa_fast.live.weights", "LiveWeights.projection"),
    ("inventory of the model", "pa_fast.engines.model", "Inventory.check"),
    ("forward passes", "transformers", "LlamaForCausalLM.forward"),
    ("journal and items", "pa_fast.sweep.recording", "Recording.record"),
    ("figure", "pa_fast.sweep.recording", "Recording.draw"),
)
"""What a part is called, its module, and its name there."""


class Clock:
    """Seconds of each part, and how often it ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inside = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block, less the parts that are timed inside it."""
        self._inside.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            whole, inside = time.perf_counter() - began, self._inside.pop()
            self._inside[-1] += whole
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - inside
            self.calls[name] = self.calls.get(name, 0) + 1

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed as `name`."""

        @functools.wraps(work)
        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return work(*args, **options)

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="300m", help="of bench/synthetic.py")
    parser.add_argument("--lambdas", default="0:1:0.05")
    parser.add_argument("--store", default="dense")
    options = parser.parse_args()
    began = time.perf_counter()
    import transformers  # noqa: F401 - what a first import costs is no part of the job

    print(f"imports: {time.perf_counter() - began:.2f} s", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory() as folder,
        pair_of(pathlib.Path(folder) / "pair", options.size) as (base, instruct),
    ):
        clocks = run(base, instruct, pathlib.Path(folder) / "out", options.lambdas, options.store)
    for job, clock in clocks.items():
        whole = sum(clock.seconds.values())
        print(f"\n{job}: {whole:.2f} s")
        for name, seconds in sorted(clock.seconds.items(), key=lambda row: -row[1]):
            print(f"  {seconds:8.3f} s {seconds / whole:6.1%}  {clock.calls[name]:5} ×  {name}")


def run(
    base: pathlib.Path, instruct: pathlib.Path, out: pathlib.Path, lambdas: str, store: str
) -> dict[str, Clock]:
    """The job by its steps."""
    clocks = {
        "load": Clock(),
        "first switch": Clock(),
        f"sweep of {len(pa_fast.lambdas(lambdas))} λ": Clock(),
    }
    load, first, sweep = clocks.values()
    with _watched(load), load.part("the rest"):
        lm = pa_fast.load(base, instruct, store=store)
    with _watched(first), first.part("the rest"):
        lm.set_lambda(0.3)
    with _watched(sweep), sweep.part("the rest"):
        result = pa_fast.sweep(lm, lambdas, [Likelihood()], out)
    assert not result.failures, result.failures
    return clocks


@contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    import importlib

    with ExitStack() as stack:
        for name, module, path in PARTS:
            *owners, leaf = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            stack.enter_context(
                mock.patch.object(owner, leaf, clock.timed(name, getattr(owner, leaf)))
            )
        yield


if __name__ == "__main__":
    main()

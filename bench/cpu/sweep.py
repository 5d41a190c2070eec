"""What a sweep costs beside the evaluator's forward passes, per λ (P6); mergekit's merge in memory
alone; and by way of the disk: merge, then `from_pretrained`.

The sweep is whole: 11 λ on a loaded pair, each switched, compared with a fresh merge, its effective
λ measured, checksums taken and one line synced to the journal; load is counted too, divided by the
number of λ. Only the model's forward passes are taken off. `PA_FAST_BENCH_SIZE=1b make bench` for
the quoted figure (8 GB of disk, 10 GB of memory); 300m by default.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import pa_fast
from bench import merges, peers
from bench.cases import JOBS
from bench.merges import Contender
from bench.process import process, removed
from bench.run import Run
from bench.synthetic import pair_of
from pa_fast.throughput.harness import Sample, Way, by_itself, by_wall

CASE = JOBS["sweep"]
BY_DISK = (0.3, 0.6)
"""λ that are merged and loaded in each round; one costs as much as another."""
GRID = pa_fast.lambdas("0:1:0.1")
IN_MEMORY = f"{merges.IN_MEMORY}, per λ"


class Likelihood:
    """A small evaluator, eight continuations scored, that knows how long the model's forward passes
    took meanwhile.

    They are timed in the class: a hook on the model would be refused.
    """

    name = "likelihood"
    higher_is_better = True

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def __call__(self, engine: pa_fast.Engine) -> pa_fast.Score:
        timed = self._timed(LlamaForCausalLM.forward)
        with mock.patch.object(LlamaForCausalLM, "forward", timed):
            found = engine.loglikelihood([([k + 1, 2, 3], list(range(4, 36))) for k in range(8)])
        items = tuple(pa_fast.Item(str(k), "", one.logprob) for k, one in enumerate(found))
        return pa_fast.Score(
            statistics.mean(item.score for item in items), "nats", len(items), items
        )

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            sample = by_wall(lambda: results.append(forward(*args, **kwargs)))
            self.wall_s, self.cpu_s = self.wall_s + sample.wall_s, self.cpu_s + (sample.cpu_s or 0)
            return results[0]

        return timed


def sweep(run: Run) -> None:
    with pair_of(run.folder / "pair", CASE.size) as (base, instruct):
        out = run.folder / "out"
        loads: list[float] = []
        ours = Way("pa_fast sweep, per λ", lambda: _swept(base, instruct, out, loads))
        ways = [ours, ours.repeated]
        by_disk = {"pa-fast merge": merges.ours}
        if peers.MERGEKIT.is_here:
            by_disk["mergekit"] = merges.mergekit
        for tool, merge in by_disk.items():
            name = f"{tool} + from_pretrained, per λ"
            ways.append(Way(name, functools.partial(_by_disk, merge, base, instruct, out)))
        with ExitStack() as peer:
            if peers.MERGEKIT.is_here:
                theirs = peer.enter_context(merges.in_memory(base, instruct))
                theirs.switch(BY_DISK[0])  # the first pays for memory that later ones find
                share = theirs.wrong_share(0.05)
                ways.insert(
                    -1,
                    Way(
                        IN_MEMORY,
                        functools.partial(_in_memory, theirs),
                        wrong_share=share,
                        note="without loading; wrong weights at λ = 0.05",
                    ),
                )
            found = CASE.time(*ways, measure=by_itself, warm=0)
        weights = pa_fast.inspect(base, instruct).parameters
    slowest = ways[-1].name
    times = {name: way.median_s / found[ours.name].median_s for name, way in found.items()}
    headline = f"1/{times[slowest]:.1f} of {slowest.removesuffix(', per λ')}"
    if IN_MEMORY in times:
        loaded = found[ours.name].median_s - statistics.median(loads)
        headline += (
            f", {1 / times[IN_MEMORY]:.2f} × its merge_state_dicts + copy_"
            f" ({loaded / found[IN_MEMORY].median_s:.2f} × without loading, as theirs is)"
        )
    run.record(
        CASE.target,
        f"sweep of {len(GRID)} λ without its forward passes, {weights / 1e9:.3g} G bf16 weights",
        found.values(),
        ours.name,
        headline=headline,
        goal=CASE.goal,
    )


def _in_memory(theirs: merges.InMemory) -> Sample:
    """One λ of those that are merged by way of the disk, without a look at what was written."""
    samples = [theirs.switch(lam) for lam in BY_DISK]
    return Sample(
        sum(one.wall_s for one in samples) / len(samples),
        sum(one.cpu_s or 0 for one in samples) / len(samples),
    )


def _swept(
    base: pathlib.Path, instruct: pathlib.Path, out: pathlib.Path, loads: list[float]
) -> Sample:
    """Load and sweep, less the forward passes, divided by the number of λ; the part of that which
    is loading is added to `loads`."""
    evaluator = Likelihood()

    def work() -> None:
        start = time.perf_counter()
        lm = pa_fast.load(base, instruct)
        loads.append((time.perf_counter() - start) / len(GRID))
        result = pa_fast.sweep(lm, GRID, [evaluator], out)
        assert not result.failures, result.failures
        lm.weights.close()

    whole = by_wall(work)
    assert evaluator.cpu_s, "no forward pass was timed"
    shutil.rmtree(out)
    return Sample(
        (whole.wall_s - evaluator.wall_s) / len(GRID),
        ((whole.cpu_s or 0) - evaluator.cpu_s) / len(GRID),
    )


def _by_disk(
    merge: Callable[..., Contender], base: pathlib.Path, instruct: pathlib.Path, out: pathlib.Path
) -> Sample:
    """The tool's whole process, then the model in this one, per λ."""
    wall = cpu = 0.0
    for lam in BY_DISK:
        contender = merge(base, instruct, lam, out)
        for part in (process(*contender.command), by_wall(lambda: _loaded(out))):
            wall, cpu = wall + part.wall_s, cpu + (part.cpu_s or 0)
        removed(out)
    return Sample(wall / len(BY_DISK), cpu / len(BY_DISK))


def _loaded(folder: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    with torch.no_grad():  # a memory map is not loaded before it is read
        sum(float(parameter.sum()) for parameter in model.parameters())

"""What a sweep costs beside the evaluator's forward passes, per λ (P6), and by way of the disk:
merge, then `from_pretrained`.

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
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import pa_fast
from bench import merges, peers
from bench.cases import JOBS
from bench.merges import Contender
from bench.process import Run, here, process, removed, way
from bench.synthetic import pair_of
from bench.table import record

CASE = JOBS["sweep"]
BY_DISK = (0.3, 0.6)
"""λ that are merged and loaded in each round; one costs as much as another."""
GRID = pa_fast.lambdas("0:1:0.1")


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
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(LlamaForCausalLM, "forward", self._timed(LlamaForCausalLM.forward))
            found = engine.loglikelihood([([k + 1, 2, 3], list(range(4, 36))) for k in range(8)])
        items = tuple(pa_fast.Item(str(k), "", one.logprob) for k, one in enumerate(found))
        return pa_fast.Score(
            statistics.mean(item.score for item in items), "nats", len(items), items
        )

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            found = []
            run = here(lambda: found.append(forward(*args, **kwargs)))
            self.wall_s, self.cpu_s = self.wall_s + run.wall_s, self.cpu_s + run.cpu_s
            return found[0]

        return timed


def test_sweep(benchmark: Any, tmp_path: pathlib.Path) -> None:
    with pair_of(tmp_path / "pair", CASE.size) as (base, instruct):
        out = tmp_path / "out"
        ways: dict[str, Callable[[], Run]] = {
            "pa_fast sweep, per λ": lambda: _swept(base, instruct, out),
            "pa_fast sweep, per λ, again": lambda: _swept(base, instruct, out),
            "pa-fast merge + from_pretrained, per λ": lambda: _by_disk(
                merges.ours, base, instruct, out
            ),
        }
        if peers.MERGEKIT.is_here:
            ways["mergekit + from_pretrained, per λ"] = lambda: _by_disk(
                merges.mergekit, base, instruct, out
            )
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for round_ in range(CASE.rounds_here):
            for name in list(ways)[:: -1 if round_ % 2 else 1]:
                runs[name].append(ways[name]())
        sweep, *_, slowest = (statistics.median(run.wall_s for run in of) for of in runs.values())
        against = list(ways)[-1]
        weights = pa_fast.inspect(base, instruct).parameters
        record(
            benchmark,
            "P6",
            f"sweep of {len(GRID)} λ without its forward passes, {weights / 1e9:.3g} G bf16"
            " weights",
            [way(name, of) for name, of in runs.items()],
            against="pa_fast sweep, per λ",
            goal="≤ 1/20 of mergekit + from_pretrained",
            headline=f"1/{slowest / sweep:.1f} of {against.removesuffix(', per λ')}",
            noise=("pa_fast sweep, per λ", "pa_fast sweep, per λ, again"),
        )


def _swept(base: pathlib.Path, instruct: pathlib.Path, out: pathlib.Path) -> Run:
    """Load and sweep, less the forward passes, divided by the number of λ."""
    evaluator = Likelihood()

    def work() -> None:
        lm = pa_fast.load(base, instruct)
        result = pa_fast.sweep(lm, GRID, [evaluator], out)
        assert not result.failures, result.failures
        lm.weights.close()

    run = here(work)
    assert evaluator.cpu_s, "no forward pass was timed"
    shutil.rmtree(out)
    return Run(
        (run.wall_s - evaluator.wall_s) / len(GRID), (run.cpu_s - evaluator.cpu_s) / len(GRID)
    )


def _by_disk(
    merge: Callable[..., Contender], base: pathlib.Path, instruct: pathlib.Path, out: pathlib.Path
) -> Run:
    """The tool's whole process, then the model in this one, per λ."""
    wall = cpu = 0.0
    for lam in BY_DISK:
        for run in (process(*merge(base, instruct, lam, out).command), here(lambda: _loaded(out))):
            wall, cpu = wall + run.wall_s, cpu + run.cpu_s
        removed(out)
    return Run(wall / len(BY_DISK), cpu / len(BY_DISK))


def _loaded(folder: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    with torch.no_grad():  # a memory map is not loaded before it is read
        sum(float(parameter.sum()) for parameter in model.parameters())

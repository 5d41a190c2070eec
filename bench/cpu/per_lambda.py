"""What one more λ costs on a live model: our switch, the same by plain torch, and by way of the
disk.

`PA_FAST_BENCH_SIZE=1b make bench` for the quoted figure (8 GB of disk, 10 GB of memory); 300m by
default.
"""

from __future__ import annotations

import itertools
import shutil

import torch

import pa_fast
from bench.cases import JOBS
from bench.run import Run
from bench.synthetic import write_pair
from pa_fast.throughput.harness import Way

CASE = JOBS["sweep"]


def per_lambda(run: Run) -> None:
    from transformers import AutoModelForCausalLM

    base, instruct = write_pair(run.folder, CASE.size)
    lm = pa_fast.load(base, instruct)
    sides = [
        dict(
            AutoModelForCausalLM.from_pretrained(
                side, dtype=torch.bfloat16, trust_remote_code=False
            ).named_parameters()
        )
        for side in (base, instruct)
    ]
    merged = run.folder / "merged"
    grid = itertools.cycle(0.1 * k + 0.05 for k in range(10))

    def plain(lam: float) -> None:
        with torch.no_grad():
            for name, parameter in lm.model.named_parameters():
                parameter.copy_(torch.lerp(sides[0][name], sides[1][name], lam))

    def by_disk(lam: float) -> None:
        shutil.rmtree(merged, ignore_errors=True)
        pa_fast.merge(base, instruct, lam=lam, out=merged)
        model = AutoModelForCausalLM.from_pretrained(
            merged, dtype=torch.bfloat16, trust_remote_code=False
        )
        with torch.no_grad():  # a memory map is not loaded before it is read
            sum(float(parameter.sum()) for parameter in model.parameters())

    plain(0.4)
    assert lm.weights.changed(), "the check must see that somebody else wrote"
    lm.set_lambda(0.4)
    lm.weights.verify()
    weights = lm.weights.memory().live_bytes // 2
    ours = Way("switch", lambda: lm.set_lambda(next(grid)), moved_bytes=6 * weights)
    ways = CASE.time(
        ours,
        Way("copy_(torch.lerp)", lambda: plain(next(grid)), moved_bytes=10 * weights),
        Way("merge and reload", lambda: by_disk(next(grid))),
        ours.repeated,
    )
    ratio = ways["merge and reload"].median_s / ways[ours.name].median_s
    run.record(
        "P6",
        f"one λ in place, {weights / 1e9:.3g} G bf16 weights",
        ways.values(),
        ours.name,
        headline=f"a switch is 1/{ratio:.1f} of merge and reload",
    )

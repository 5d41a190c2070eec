"""What one more λ costs on a live model: our switch, the same by plain torch and by mergekit in
memory, and by way of the disk.

`PA_FAST_BENCH_SIZE=1b make bench` for the quoted figure (8 GB of disk, 10 GB of memory); 300m by
default.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import ExitStack

import torch

import pa_fast
from bench import merges, peers
from bench.cases import JOBS
from bench.run import Run
from bench.synthetic import write_pair
from pa_fast.throughput.harness import Way, by_itself, by_wall

CASE = JOBS["sweep"]
RELOAD = "merge and reload"
FEW = 0.05
"""The λ at which weights are compared with `torch.lerp`'s: small steps are where rounding shows."""


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

    def timed(name: str, work: Callable[[float], object], moved_bytes: int | None = None) -> Way:
        return Way(name, lambda: by_wall(lambda: work(next(grid))), moved_bytes=moved_bytes)

    ours = timed("switch", lm.set_lambda, 6 * weights)
    ways = [
        ours,
        timed("copy_(torch.lerp)", plain, 10 * weights),
        timed(RELOAD, by_disk),
        ours.repeated,
    ]
    with ExitStack() as peer:
        if peers.MERGEKIT.is_here:
            theirs = peer.enter_context(merges.in_memory(base, instruct))
            ways.append(
                Way(
                    merges.IN_MEMORY,
                    lambda: theirs.switch(next(grid)),
                    wrong_share=theirs.wrong_share(FEW),
                    note=f"{peers.MERGEKIT.versions()}; linear; wrong weights at λ = {FEW}",
                )
            )
        found = CASE.time(*ways, measure=by_itself)
    lm.weights.close()
    ratios = {name: way.median_s / found[ours.name].median_s for name, way in found.items()}
    headline = f"a switch is 1/{ratios[RELOAD]:.1f} of merge and reload"
    if merges.IN_MEMORY in found:
        theirs_share = found[merges.IN_MEMORY].wrong_share or 0
        headline += (
            f", {1 / ratios[merges.IN_MEMORY]:.2f} × mergekit's merge_state_dicts + copy_, of"
            f" whose weights {theirs_share:.2%} differ from torch.lerp's at λ = {FEW}"
        )
    run.record(
        "P6",
        f"one λ in place, {weights / 1e9:.3g} G bf16 weights",
        found.values(),
        ours.name,
        headline=headline,
    )

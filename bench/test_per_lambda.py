"""What one more λ costs on a live model: our switch, the same by plain torch, and by way of the
disk.

`PA_FAST_BENCH_SIZE=1b make bench` for the quoted figure (8 GB of disk, 10 GB of memory); 300m by
default.
"""

from __future__ import annotations

import itertools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch

import pa_fast
from bench.cases import JOBS
from bench.synthetic import write_pair
from bench.table import record, timed

CASE = JOBS["sweep"]


def test_per_lambda(benchmark: Any, tmp_path: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    base, instruct = write_pair(tmp_path, CASE.size)
    lm = pa_fast.load(base, instruct)
    sides = [
        dict(
            AutoModelForCausalLM.from_pretrained(
                side, dtype=torch.bfloat16, trust_remote_code=False
            ).named_parameters()
        )
        for side in (base, instruct)
    ]
    merged = tmp_path / "merged"
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
    assert lm.weights.verify(), "wrong bits: no speed is printed"
    ways: dict[str, Callable[[], object]] = {
        name: lambda run=run: run(next(grid))
        for name, run in {
            "switch": lm.set_lambda,
            "copy_(torch.lerp)": plain,
            "merge and reload": by_disk,
            "switch again": lm.set_lambda,
        }.items()
    }
    weights = lm.weights.memory().live_bytes // 2
    found = timed(
        ways,
        CASE.rounds_here,
        {"switch": 6 * weights, "switch again": 6 * weights, "copy_(torch.lerp)": 10 * weights},
    )
    ratio = found[2].median_s / found[0].median_s
    record(
        benchmark,
        "P6",
        f"one λ in place, {weights / 1e9:.3g} G bf16 weights",
        found,
        against="switch",
        headline=f"a switch is 1/{ratio:.1f} of merge and reload",
        noise=("switch", "switch again"),
    )
    shutil.rmtree(tmp_path)

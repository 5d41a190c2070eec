"""What one more λ costs on a live model: our switch, the same by plain torch, and by way of the disk.

`PA_FAST_BENCH_SIZE=1b make bench` for the README's figure (8 GB of disk, 10 GB of memory); 300m by default.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pa_fast
from bench.synthetic import write_pair

ROUNDS = 5


def test_per_lambda(benchmark: Any, capsys: Any, tmp_path: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    base, instruct = write_pair(tmp_path, os.environ.get("PA_FAST_BENCH_SIZE", "300m"))
    lm = pa_fast.load(base, instruct)
    sides = [
        dict(AutoModelForCausalLM.from_pretrained(side, dtype=torch.bfloat16).named_parameters()) for side in (base, instruct)
    ]
    merged = tmp_path / "merged"

    def plain(lam: float) -> None:
        with torch.no_grad():
            for name, parameter in lm.model.named_parameters():
                parameter.copy_(torch.lerp(sides[0][name], sides[1][name], lam))

    def by_disk(lam: float) -> None:
        shutil.rmtree(merged, ignore_errors=True)
        pa_fast.merge(base, instruct, lam=lam, out=merged)
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
        with torch.no_grad():  # a memory map is not loaded before it is read
            sum(float(parameter.sum()) for parameter in model.parameters())

    plain(0.4)
    assert lm.weights.changed(), "the check must see that somebody else wrote"
    lm.set_lambda(0.4)
    assert lm.weights.verify(), "wrong bits: no speed is printed"
    ways: dict[str, Callable[[float], None]] = {"switch": lm.set_lambda, "copy_(torch.lerp)": plain, "merge and reload": by_disk}
    ways["switch again"] = lm.set_lambda
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            run(0.1 * round_ + 0.05)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    weights = lm.weights.memory().live_bytes // 2
    with capsys.disabled():
        print(f"\none λ of {weights / 1e9:.2f} G bf16 weights, {torch.get_num_threads()} threads, torch {torch.__version__}:")
        for name, value in medians.items():
            print(f"  {name:18} {value:7.3f} s  {value / medians['switch']:5.2f} × the switch")
        print(f"  the switch moves {6 * weights / medians['switch'] / 1e9:.1f} GB/s")
    benchmark.extra_info |= medians
    benchmark.pedantic(lm.set_lambda, args=(0.3,), rounds=ROUNDS)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()

"""Live weights where `torch.set_num_threads` does nothing, as in vLLM's CPU worker: work inside of
work must not wait for the threads that it runs on. Today that is how packed weights are merged."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIMIT_S = 300
"""The program takes seconds; a machine full of other work may make it tens."""

PROGRAM = """
import sys, torch
torch.set_num_threads(2)
torch.set_num_threads = lambda count: None

import pa_fast
base = {f"w{k}": torch.randn(1024, 1024).bfloat16() for k in range(4)}
instruct = {name: tensor + 0.1 for name, tensor in base.items()}
for store in ("dense", "packed", "sparse"):
    live = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    weights = pa_fast.LiveWeights.bind(live, base, instruct, store=store)
    print(store, flush=True)
    weights.set_lambda(0.3)
    for name in sys.argv[1:]:
        getattr(weights, name)()
        print(name, flush=True)
    assert weights.read_back(merge_again=True) == weights.checksum()
    live["w3"].view(-1)[7] += 1
    assert weights.changed() == ["w3"], weights.changed()
    print("found", flush=True)
"""
CALLS = ["changed", "verify", "read_back", "checksum", "effective_lambda"]


def test_every_proof_ends() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *CALLS],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as stalled:
        pytest.fail(f"waits for itself after {(stalled.stdout or b'').decode().split()}")
    assert done.stdout.split() == [
        said for store in ("dense", "packed", "sparse") for said in (store, *CALLS, "found")
    ], done.stderr

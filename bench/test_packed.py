"""Packed deltas (P12): encoding, proofs included, against reading both sides once; switches against dense; memory of an encoding.

`PA_FAST_BENCH_SIZE=1b make bench` for larger ones; 100m by default. The bits of every switch are compared first.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from pa_kernels import Lerp, Packed, reference

from bench.process import Run, here, middle
from bench.synthetic import write_pair
from bench.test_load import read_into_memory
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.delta.entry import Source, Whole
from pa_fast.delta.packed_store import PackedStore

ROUNDS = int(os.environ.get("PA_FAST_BENCH_ROUNDS", "5"))
PEAK = """
import sys, threading, time
import pa_fast.engines.encoding as encoding, transformers
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
encoding.encode(*sys.argv[1:4], "packed")
done = True
thread.join()
print(peak - start)
"""
"""Prints how far anonymous memory rises while a pair is encoded, in kB, imports apart."""


def test_packed(benchmark: Any, capsys: Any, tmp_path: pathlib.Path) -> None:
    folders = write_pair(tmp_path, os.environ.get("PA_FAST_BENCH_SIZE", "100m"), 0.017)
    with Checkpoint.open(folders[0]) as b, Checkpoint.open(folders[1]) as i:
        base, instruct = ({name: side.tensor(name) for name in side.tensors} for side in (b, i))
        sources = [Source(n, t, instruct[n], t.dtype, t.device) for n, t in base.items()]
        made = list(PackedStore().encode(sources))
        pairs = [(s, e) for s, e in zip(sources, made) if not isinstance(e, Whole)]
        live = [s.base.clone() for s, _ in pairs]
        packed, dense = (
            Packed(live, [e for _, e in pairs]),
            Lerp(live, [s.base for s, _ in pairs], [s.instruct for s, _ in pairs]),
        )  # type: ignore[misc]
        packed.holds(0.0)
        packed.run_(0.3)
        for w, (s, _) in zip(live, pairs):
            assert reference.same_bits(w, torch.lerp(s.base, s.instruct, 0.3)).all(), "wrong bits: no speed is printed"
        lams = iter(k / 1000 for k in range(1, 1000))

        def read() -> None:
            for side in (b, i):
                read_into_memory(side)

        ways: dict[str, Callable[[], object]] = {
            "read both sides": read,
            "read again": read,
            "encode and prove": lambda: [None for _ in PackedStore().encode(sources)],
            "packed switch": lambda: packed.run_(next(lams)),
            "packed switch again": lambda: packed.run_(next(lams)),
        }
        runs: dict[str, list[Run]] = {name: [] for name in [*ways, "dense switch"]}
        for _ in range(ROUNDS):
            for name, work in ways.items():
                runs[name].append(here(work))
            runs["dense switch"].append(here(lambda: dense.run_(0.3)))
            packed.holds(0.3)
    weights = sum(t.numel() for t in base.values())
    anonymous = int(subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, folders), str(tmp_path / "delta")], capture_output=True, text=True, check=True
    ).stdout.split()[-1])  # fmt: skip
    largest = max(t.nbytes for t in base.values())
    with capsys.disabled():
        where = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"\npacked, {weights / 1e6:.0f} M bf16 weights, delta 1.7 %, {ROUNDS} rounds, {where}")
        floor = middle(runs["read both sides"]).wall_s
        for name, values in runs.items():
            found = middle(values)
            benchmark.extra_info[name] = vars(found)
            print(f"  {name:20}{found.wall_s:8.3f} s, reading / it {floor / found.wall_s:6.3f} {found.cpu_s:8.3f} s of processor")
        print(
            f"  encoding to a file: {anonymous / 1e3:.0f} MB of anonymous memory; the largest tensor has {largest / 1e6:.0f} MB"
        )
    benchmark.pedantic(ways["packed switch"], rounds=1)

"""Encoding a packed delta, both ends proven (P12), against reading both sides once; and the memory
that it takes."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

from bench.cases import JOBS
from bench.reading import read_into_memory, weights
from bench.synthetic import write_pair
from bench.table import bytes_of, counted, record, timed
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.store import Source

CASE, RELATIVE = JOBS["encode"], 0.017
PEAK = """
import sys, threading, time
import pa_fast.engines.encoding as encoding, transformers
def anonymous():
    status = open("/proc/self/status")
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1])
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
"""Prints how far anonymous memory rises while a pair is encoded to a file, in kB, imports apart."""


def test_encode(benchmark: Any, tmp_path: pathlib.Path) -> None:
    folders = write_pair(tmp_path, CASE.size, RELATIVE)
    with Checkpoint.open(folders[0]) as b, Checkpoint.open(folders[1]) as i:
        base, instruct = ({name: side.tensor(name) for name in side.tensors} for side in (b, i))
        sources = [Source(name, t, instruct[name], t.dtype, t.device) for name, t in base.items()]

        def encode() -> None:
            for _ in PackedStore().encode(sources):
                pass

        ways = {
            "read both sides": lambda: read_into_memory(b, i),
            "encode": encode,
            "encode, again": encode,
        }
        floor, ours, again = timed(ways, CASE.rounds_here, {"read both sides": 2 * weights(b, i)})
        count, largest = weights(b), max(t.nbytes for t in base.values())
    said = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, folders), str(tmp_path / "delta")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = 1024 * int(said.stdout.split()[-1])
    ours = replace(
        ours, peak_bytes=peak, note=f"to a file; the largest tensor has {bytes_of(largest)}"
    )
    record(
        benchmark,
        CASE.target,
        f"packed encoding, {counted(count)} bf16 weights, delta {RELATIVE:.1%}",
        [floor, ours, again],
        against=floor.name,
        goal=CASE.goal,
        noise=(ours.name, again.name),
        headline=(
            f"{floor.median_s / ours.median_s:.3f} × the rate of reading both sides;"
            f" {bytes_of(peak)} of memory"
        ),
    )

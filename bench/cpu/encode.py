"""Encoding a packed delta, both ends proven (P12), against reading both sides once; and the memory
that it takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from bench.cases import JOBS
from bench.run import Run
from bench.synthetic import read_into_memory, weight_count, write_pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.store import Source
from pa_fast.throughput.harness import Way, format_large, format_size

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


def encode(run: Run) -> None:
    folders = write_pair(run.folder, CASE.size, RELATIVE)
    with Checkpoint.open(folders[0]) as b, Checkpoint.open(folders[1]) as i:
        base, instruct = ({name: side.tensor(name) for name in side.tensors} for side in (b, i))
        sources = [Source(name, t, instruct[name], t.dtype, t.device) for name, t in base.items()]
        count, largest = weight_count(b), max(t.nbytes for t in base.values())
        read = Way(
            "read both sides",
            lambda: read_into_memory(b, i),
            moved_bytes=2 * weight_count(b, i),
        )
        ours = Way("encode", lambda: [None for _ in PackedStore().encode(sources)])
        floor, encoded, again = CASE.time(read, ours, ours.repeated).values()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, folders), str(run.folder / "delta")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = 1024 * int(done.stdout.split()[-1])
    note = f"to a file; the largest tensor has {format_size(largest)}"
    run.record(
        CASE.target,
        f"packed encoding, {format_large(count)} bf16 weights, delta {RELATIVE:.1%}",
        [floor, replace(encoded, peak_bytes=peak, note=note), again],
        floor.name,
        goal=CASE.goal,
        headline=(
            f"{floor.median_s / encoded.median_s:.3f} × the rate of reading both sides;"
            f" {format_size(peak)} of memory"
        ),
    )

"""Inspect (P8): a 70B-shaped pair of sparse files with true headers, whole process; and what a
fingerprint adds to it."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time

from bench.cases import JOBS
from bench.process import silently
from bench.run import Run
from bench.synthetic import SIZES, config, shapes
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.throughput.harness import Way

CASE = JOBS["inspect"]
WITHOUT_TORCH = """
import sys
from pa_fast.cli import main
sys.argv[0] = "pa-fast"
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch was imported"
"""
MERGES = 280147


def write_headers(folder: pathlib.Path, shards: int) -> pathlib.Path:
    """A folder of Llama-3-70B's shapes: true headers, and holes where the 141 GB of weights would
    be."""
    folder.mkdir()
    named = dict(shapes("70b"))
    names = list(named)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        entries, at = {}, 0
        for name in names[shard::shards]:
            size = 2 * math.prod(named[name])
            entries[name] = {
                "dtype": "BF16",
                "shape": list(named[name]),
                "data_offsets": [at, at + size],
            }
            weight_map[name] = file
            at += size
        text = json.dumps(entries).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config("70b")))
    # as many tokens and merges as the real one, and other bytes on the two sides, so that both are
    # parsed
    model = {
        "vocab": {f"token {n}": n for n in range(SIZES["70b"][-1])},
        "merges": [f"token {n}" for n in range(MERGES)],
    }
    document = {"version": folder.name, "added_tokens": [], "model": {"type": "BPE", **model}}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def inspect(run: Run) -> None:
    base = write_headers(run.folder / "base", 30)
    instruct = write_headers(run.folder / "instruct", 17)
    assert sum(file.stat().st_size for file in base.glob("*.safetensors")) > 140e9
    pa_fast = str(pathlib.Path(sys.executable).with_name("pa-fast"))
    command = ["inspect", str(base), str(instruct)]
    silently(sys.executable, "-c", WITHOUT_TORCH, *command)
    ours = Way("pa-fast inspect", lambda: silently(pa_fast, *command))
    ways = CASE.time(
        ours, ours.repeated, Way("pa-fast --help", lambda: silently(pa_fast, "--help"))
    )
    with Checkpoint.open(base) as one:
        began = time.perf_counter()
        one.quick_fingerprint()
        fingerprint_s, tensors = time.perf_counter() - began, len(one.tensors)
    tokens = SIZES["70b"][-1]
    run.record(
        CASE.target,
        f"inspect, 70B shapes: {tensors} tensors in 30 and 17 files, 2 × {tokens:,} tokens",
        ways.values(),
        ours.name,
        goal=CASE.goal,
        headline=(
            f"{ways[ours.name].median_s:.2f} s, without torch (a fingerprint would add"
            f" {fingerprint_s * 1e3:.0f} ms a side)"
        ),
    )

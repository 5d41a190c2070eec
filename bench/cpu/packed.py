"""A packed switch against the dense one, of the same pair and with the same bits."""

from __future__ import annotations

import itertools

import torch
from pa_kernels import Lerp, Packed, PackedTensor, reference

from bench.cases import OPS
from bench.run import Run
from bench.synthetic import write_pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.throughput.harness import Way, format_large, require_bits

CASE, RELATIVE = OPS["packed"], 0.017


def packed(run: Run) -> None:
    folders = write_pair(run.folder, CASE.size, RELATIVE)
    with Checkpoint.open(folders[0]) as one, Checkpoint.open(folders[1]) as other:
        sides = [(one.tensor(name), other.tensor(name)) for name in one.tensors]
        encoded = [(*pair, PackedTensor.encode(*pair)) for pair in sides]
        base, instruct = (
            [pair[side] for pair in encoded if pair[2] is not None] for side in (0, 1)
        )
        entries = [entry for _, _, entry in encoded if entry is not None]
        live, beside = ([b.clone() for b in base] for _ in range(2))
        switch, dense = Packed(live, entries), Lerp(beside, base, instruct)
        switch.holds(0.0)
        for lam in (0.7, 0.3):
            switch.run_(lam)
        for w, b, i in zip(live, base, instruct):
            require_bits(bool(reference.same_bits(w, torch.lerp(b, i, 0.3)).all()), "packed switch")
        lams = itertools.cycle(k / 1000 for k in range(1, 1000))
        live_bytes, codes = sum(w.nbytes for w in live), sum(entry.nbytes for entry in entries)
        ours = Way(
            "packed switch",
            lambda: switch.run_(next(lams)),
            moved_bytes=2 * live_bytes + codes,
            kept_bytes=codes,
        )
        whole = Way(
            "dense switch",
            lambda: dense.run_(next(lams)),
            moved_bytes=3 * live_bytes,
            kept_bytes=2 * live_bytes,
        )
        ways = CASE.time(whole, ours, ours.repeated)
    count, took = live_bytes // 2, ways[ours.name].median_s
    run.record(
        CASE.target,
        f"packed switches of {format_large(count)} bf16 weights, delta {RELATIVE:.1%}",
        ways.values(),
        whole.name,
        headline=(
            f"{took / ways[whole.name].median_s:.1f} × the dense time, {took / count * 1e9:.2f} ns"
            f" a weight, {2 + codes / count:.2f} bytes per weight in all"
        ),
    )

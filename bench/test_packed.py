"""A packed switch against the dense one, of the same pair and with the same bits."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import Any

import torch
from pa_kernels import Lerp, Packed, PackedTensor, reference

from bench.cases import OPS
from bench.synthetic import write_pair
from bench.table import counted, record, timed
from pa_fast.checkpoint.reader import Checkpoint

CASE, RELATIVE = OPS["packed"], 0.017


def test_packed(benchmark: Any, tmp_path: pathlib.Path) -> None:
    folders = write_pair(tmp_path, CASE.size, RELATIVE)
    with Checkpoint.open(folders[0]) as one, Checkpoint.open(folders[1]) as other:
        sides = [(one.tensor(name), other.tensor(name)) for name in one.tensors]
        made = [
            (pair, entry) for pair in sides if (entry := PackedTensor.encode(*pair)) is not None
        ]
        base, instruct, entries = (
            [b for (b, _), _ in made],
            [i for (_, i), _ in made],
            [entry for _, entry in made],
        )
        live, beside = ([b.clone() for b in base] for _ in range(2))
        packed, dense = Packed(live, entries), Lerp(beside, base, instruct)
        packed.holds(0.0)
        for lam in (0.7, 0.3):
            packed.run_(lam)
        for w, b, i in zip(live, base, instruct):
            assert reference.same_bits(w, torch.lerp(b, i, 0.3)).all(), "wrong bits: no speed"
        lams = iter([k / 1000 for k in range(1, 1000)] * 99)
        ways = {
            "dense switch": lambda: dense.run_(next(lams)),
            "packed switch": lambda: packed.run_(next(lams)),
            "packed switch, again": lambda: packed.run_(next(lams)),
        }
        live_bytes = sum(w.nbytes for w in live)
        codes = sum(entry.nbytes for entry in entries)
        moved = {"dense switch": 3 * live_bytes} | dict.fromkeys(
            list(ways)[1:], 2 * live_bytes + codes
        )
        floor, ours, again = timed(ways, CASE.rounds_here, moved)
    count = live_bytes // 2
    ways_ = [
        replace(floor, kept_bytes=2 * live_bytes),
        *(replace(way, kept_bytes=codes) for way in (ours, again)),
    ]
    record(
        benchmark,
        CASE.target,
        f"packed switches of {counted(count)} bf16 weights, delta {RELATIVE:.1%}",
        ways_,
        against=floor.name,
        noise=(ours.name, again.name),
        headline=(
            f"{ours.median_s / floor.median_s:.1f} × the dense time,"
            f" {ours.median_s / count * 1e9:.2f} ns a weight, {2 + codes / count:.2f} bytes per"
            " weight in all"
        ),
    )

"""Encoding packed codes, both ends proven, beside reading both checkpoints to the device (P12)."""

from __future__ import annotations

import pathlib

from safetensors.torch import save_file

from bench.cases import TARGETS
from bench.gpu.run import GpuRun
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.store import Source
from pa_fast.throughput.harness import Way, format_large


def encode(run: GpuRun) -> None:
    sides = _written(run, run.folder)
    with Checkpoint.open(sides[0]) as b, Checkpoint.open(sides[1]) as i:
        base, instruct = (
            {name: side.tensor(name).to(run.device) for name in side.tensors} for side in (b, i)
        )
        count = sum(tensor.numel() for tensor in base.values())
        sources = [Source(n, t, instruct[n], t.dtype, run.device) for n, t in base.items()]
        read = Way(
            "read both sides to the device",
            lambda: [side.tensor(name).to(run.device) for side in (b, i) for name in side.tensors],
            moved_bytes=4 * count,
        )
        ours = Way(
            "encode and prove", lambda: list(PackedStore().encode(sources)), moved_bytes=4 * count
        )
        ways = run.time(read, ours, ours.repeated, whole=True)
    rate = ways[read.name].median_s / ways[ours.name].median_s
    run.record(
        "P12",
        f"packed encoding of {format_large(count)} bf16 weights",
        ways.values(),
        read.name,
        goal=TARGETS["P12"].gpu_goal,
        headline=f"{rate:.2f} ×",
        met=rate >= 0.5,
    )


def _written(run: GpuRun, folder: pathlib.Path) -> list[pathlib.Path]:
    """Base and instruct folders with the tensors of one layer, just written and so in the page
    cache."""
    base = {
        f"model.layers.0.{n}.weight": run.random(*shape) for n, shape in enumerate(run.scale.layer)
    }
    sides = {
        "base": base,
        "instruct": {name: run.near(tensor, 0.017) for name, tensor in base.items()},
    }
    for side, tensors in sides.items():
        (folder / side).mkdir()
        (folder / side / "config.json").write_text("{}")
        save_file(
            {name: tensor.cpu() for name, tensor in tensors.items()},
            folder / side / "model.safetensors",
        )
    return [folder / side for side in sides]

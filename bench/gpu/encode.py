"""Encoding packed codes, both ends proven, beside reading both checkpoints to the device (P12)."""

from __future__ import annotations

import math
import pathlib
import tempfile

from safetensors.torch import save_file

from bench.gpu.clock import wall_seconds
from bench.gpu.run import Contender, Run
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.store import Source


def encode(run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sides = _written(run, pathlib.Path(folder))
        with Checkpoint.open(sides[0]) as b, Checkpoint.open(sides[1]) as i:
            base, instruct = (
                {name: side.tensor(name).to(run.device) for name in side.tensors} for side in (b, i)
            )
            count = sum(tensor.numel() for tensor in base.values())
            sources = [Source(n, t, instruct[n], t.dtype, run.device) for n, t in base.items()]
            contenders = {
                "read both sides to the device": Contender(
                    4 * count,
                    lambda: [
                        side.tensor(name).to(run.device) for side in (b, i) for name in side.tensors
                    ],
                ),
                "encode and prove": Contender(
                    4 * count, lambda: list(PackedStore().encode(sources))
                ),
            }
            contenders["encode and prove, again"] = contenders["encode and prove"]
            rows = run.time(
                "encode", contenders, count, "read both sides to the device", clock=wall_seconds
            )
    rate = 1 / (rows["encode and prove"].ratio or math.nan)
    run.ledger.verdict(
        "encode",
        "P12",
        "≥ 0.5 × the rate of reading both sides, proofs included",
        f"{rate:.2f} ×",
        rate >= 0.5,
    )


def _written(run: Run, folder: pathlib.Path) -> list[pathlib.Path]:
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

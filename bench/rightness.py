"""How right a merged checkpoint is, whoever wrote it: by pa_fast's own streaming comparison with
its sources."""

from __future__ import annotations

import pathlib
import shutil
from typing import TypedDict

import torch
from pa_kernels.cores import cores

import pa_fast
from pa_fast.checkpoint.measure import Moved, fidelity
from pa_fast.checkpoint.pair import pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import torch_dtype
from pa_fast.checkpoint.streaming import TensorMerge, merge_chunk_, over_chunks


class Rightness(TypedDict):
    """The share of weights that are not the contract's bits, and ⟨W − B, I − B⟩ / ‖I − B‖²."""

    wrong_share: float
    effective_lambda: float


def rightness(
    merged: pathlib.Path, base: pathlib.Path, instruct: pathlib.Path, lam: float
) -> Rightness:
    """Compare the folder `merged`, in whatever files, with W(λ) of the pair. A folder without
    config.json gets instruct's.

    Raises:
        AssertionError: a tensor is missing, or has another shape or dtype: it is no such merge.
    """
    if not (merged / "config.json").exists():
        shutil.copyfile(instruct / "config.json", merged / "config.json")
    report = pa_fast.verify(merged, base, instruct, lam)
    assert all(one.reason == "bits differ" for one in report.differences), report.differences
    with (
        Checkpoint.open(merged) as own,
        Checkpoint.open(base) as b,
        Checkpoint.open(instruct) as i,
        cores() as pool,
    ):
        found = pair(b, i)
        at, end = TensorMerge(lam, None), TensorMerge(1.0, None)

        def moved(
            name: str, start: int, stop: int, base: torch.Tensor, instruct: torch.Tensor
        ) -> list[Moved]:
            def as_written(
                out: torch.Tensor, base: torch.Tensor, instruct: torch.Tensor, blend: TensorMerge
            ) -> None:
                if blend is at:
                    own.chunk(name, start, stop, out)
                else:
                    merge_chunk_(out, base, instruct, blend)

            return fidelity(
                base, instruct, [at, end], torch_dtype(own.tensors[name].dtype), as_written
            )

        lerped = [name for name in found.names if found.is_lerped(name)]
        along = square = Moved(0.0, 0)
        for _, (here, whole) in over_chunks(pool, found, lerped, moved):
            along, square = along + here, square + whole
        weights = sum(found.count(name) for name in found.names)
    wrong = sum(one.differing for one in report.differences)
    return {"wrong_share": wrong / weights, "effective_lambda": along.along / square.along}

"""Merge to disk (P7) beside `cp` of one checkpoint and every other tool, fast and right in one
table: warm cache, interleaved.

`PA_FAST_BENCH_SIZE=1b make bench` for the quoted figures (10 GB of disk); 300m by default. 3b
takes 20 GB, and leaves out the tools that hold whole models in memory. Those come from environments
that `python -m bench.peers` makes; one without its environment is missing in the table.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import pa_fast
from bench import merges, peers
from bench.cases import JOBS
from bench.merges import Contender
from bench.process import Run, here, process, removed, way
from bench.rightness import rightness
from bench.synthetic import pair_of
from bench.table import record

LAM = 0.6
CASE = JOBS["merge"]


def test_merge(benchmark: Any, tmp_path: pathlib.Path) -> None:
    with pair_of(tmp_path / "pair", CASE.size) as (base, instruct):
        out = tmp_path / "out"
        contenders = _contenders(base, instruct, out)
        ways: dict[str, Callable[[], Run]] = {
            "cp": lambda: process("cp", "-r", base, out),
            "merge": lambda: here(lambda: pa_fast.merge(base, instruct, LAM, out)),
            "merge again": lambda: here(lambda: pa_fast.merge(base, instruct, LAM, out)),
            "pa-fast --version": lambda: process(
                merges.ours(base, instruct, LAM, out).command[0], "--version"
            ),
        }
        ways |= {name: lambda one=one: process(*one.command) for name, one in contenders.items()}
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        right: dict[str, Any] = {}
        for round_ in range(CASE.rounds_here):
            for name in list(ways)[:: -1 if round_ % 2 else 1]:
                runs[name].append(ways[name]())
                if name not in right and name in {*contenders, "merge"}:
                    right[name] = rightness(out, base, instruct, LAM)
                removed(out)
        for name in ("merge", "pa-fast merge"):
            assert right[name]["wrong_share"] == 0, "wrong bits: no speed is printed"
        weights = pa_fast.inspect(base, instruct).parameters
        rows = [
            way(n, of, contenders[n].note if n in contenders else "", **right.get(n, {}))
            for n, of in runs.items()
        ]
        wall = {name: statistics.median(run.wall_s for run in of) for name, of in runs.items()}
        found = f"{wall['merge'] / wall['cp']:.2f} × cp"
        if peers.MERGEKIT.is_here:
            found += (
                f"; whole process {wall['mergekit linear, bf16'] / wall['pa-fast merge']:.2f} ×"
                " mergekit"
            )
        record(
            benchmark,
            "P7",
            f"merge to disk, {weights / 1e9:.3g} G bf16 weights",
            rows,
            against="cp",
            headline=found,
            goal=(
                f"≤ 3 × cp; whole process ≥ {5 if CASE.size == '3b' else 4} × mergekit; anonymous"
                " memory ≤ 300 MB"
            ),
            noise=("merge", "merge again"),
        )


def _contenders(
    base: pathlib.Path, instruct: pathlib.Path, out: pathlib.Path
) -> dict[str, Contender]:
    """Every whole process that merges, by the name of its row."""
    found = {"pa-fast merge": merges.ours(base, instruct, LAM, out)}
    if peers.MERGEKIT.is_here:
        found["mergekit linear, bf16"] = merges.mergekit(base, instruct, LAM, out)
        if CASE.size != "3b":
            found["mergekit linear, fp32"] = merges.mergekit(
                base, instruct, LAM, out, "linear", "float32"
            )
            found["mergekit task_arithmetic, bf16"] = merges.mergekit(
                base, instruct, LAM, out, "task_arithmetic"
            )
            found["mergekit task_arithmetic, fp32"] = merges.mergekit(
                base, instruct, LAM, out, "task_arithmetic", "float32"
            )
    if CASE.size != "3b":
        one_b, one_i = (_in_one_file(base, instruct, lam) for lam in (0, 1))
        if peers.SD_MECHA.is_here:
            found["sd-mecha, fp32"] = merges.sd_mecha(one_b, one_i, LAM, out)
        found["b + λ (i − b) in bf16, save_pretrained"] = merges.naive(base, instruct, LAM, out)
        found["torch.lerp per tensor, save_file"] = merges.lerp(one_b, one_i, LAM, out)
    return found


def _in_one_file(base: pathlib.Path, instruct: pathlib.Path, lam: int) -> pathlib.Path:
    """A side of the pair as the single file that some tools read."""
    folder = base.with_name(f"one-{lam}")
    pa_fast.merge(base, instruct, lam, folder, max_shard_size=2**50)
    return folder / "model.safetensors"

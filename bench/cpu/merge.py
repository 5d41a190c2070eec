"""Merge to disk (P7) beside `cp` and `sync` of one checkpoint and every other tool, fast and right
in one table: warm cache, interleaved.

`PA_FAST_BENCH_SIZE=1b make bench` for the quoted figures (10 GB of disk); 300m by default. 3b
takes 20 GB, and leaves out the tools that hold whole models in memory. Those come from environments
that `python -m bench.peers` makes; one without its environment is missing in the table.
"""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import Any

import pa_fast
from bench import merges, peers
from bench.cases import JOBS
from bench.merges import Contender
from bench.process import process, removed
from bench.rightness import rightness
from bench.run import Run
from bench.synthetic import pair_of
from pa_fast.throughput.harness import Way, by_itself, by_wall, require_bits

LAM = 0.6
CASE = JOBS["merge"]


def merge(run: Run) -> None:
    with pair_of(run.folder / "pair", CASE.size) as (base, instruct):
        out = run.folder / "out"
        contenders = _contenders(base, instruct, out)
        ours = Way("merge", lambda: by_wall(lambda: pa_fast.merge(base, instruct, LAM, out)))
        program = merges.ours(base, instruct, LAM, out).command[0]
        ways = [
            Way(
                "cp",
                lambda: process("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', base, out),
                note="cp -r, then sync, as merges are synced",
            ),
            ours,
            ours.repeated,
            Way("pa-fast --version", lambda: process(program, "--version")),
            *(
                Way(name, lambda one=one: process(*one.command), note=one.note)
                for name, one in contenders.items()
            ),
        ]
        right: dict[str, Any] = {}

        def after(name: str) -> None:
            if name not in right and name in {*contenders, ours.name}:
                right[name] = rightness(out, base, instruct, LAM)
            removed(out)

        found = CASE.time(*ways, measure=by_itself, warm=0, after=after)
        for name in (ours.name, "pa-fast merge"):
            require_bits(right[name]["wrong_share"] == 0, name)
        weights = pa_fast.inspect(base, instruct).parameters
    wall = {name: way.median_s for name, way in found.items()}
    headline = f"{wall['merge'] / wall['cp']:.2f} × cp and sync"
    if peers.MERGEKIT.is_here:
        ratio = wall["mergekit linear, bf16"] / wall["pa-fast merge"]
        headline += f"; whole process {ratio:.2f} × mergekit"
    processor_s = found[ours.name].cpu_s or 0.0
    headline += f"; {processor_s / weights * 1e9:.2f} s of processor a 10⁹ weights, imports apart"
    run.record(
        CASE.target,
        f"merge to disk, {weights / 1e9:.3g} G bf16 weights",
        [replace(way, **right.get(name, {})) for name, way in found.items()],
        "cp",
        headline=headline,
        goal=(
            f"≤ 2 × cp and sync; whole process ≥ {5 if CASE.size == '3b' else 4} × mergekit;"
            " processor ≤ 2.5 s a 10⁹ weights; anonymous memory ≤ 300 MB"
        ),
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
        if peers.MERGEKIT.is_here:
            found["mergekit merge_state_dicts, save_file"] = merges.state_dicts(
                one_b, one_i, LAM, out
            )
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

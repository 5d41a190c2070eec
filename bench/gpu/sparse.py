"""Sparse sets at several densities, index lists and bitmaps, beside the dense switch of the same
weights."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, Sparse, SparseTensor, sparse_triton
from pa_kernels.sparse import SparseKind

from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from bench.run import Skip
from pa_fast.throughput.harness import Way, Work, format_large

DENSITIES: dict[SparseKind, tuple[float, ...]] = {
    "index": (0.005, 0.02, 0.05),
    "bitmap": (0.06, 0.15, 0.30),
}
"""An index list is the smaller one up to 6 %."""


def sparse(run: GpuRun) -> None:
    for kind, densities in DENSITIES.items():
        for density in run.some(densities):
            _of_density(run, kind, density)


def _of_density(run: GpuRun, kind: SparseKind, density: float) -> None:
    sizes = [size for size in run.scale.sparse if size * 10 * len(run.scale.sparse) <= run.room()]
    if not sizes:
        raise Skip("too little device memory is free")
    pair = FlatPair.random(run, sizes)
    lam, entries = run.scale.lams[0], []
    for b, i in zip(pair.base, pair.inst):
        mask = torch.rand(b.numel(), device=run.device) < density
        i[~mask] = b[~mask]
        entries.append(SparseTensor.encode(mask, b[mask], i[mask], b.numel(), kind=kind))
    dense, shipped = Lerp(pair.out, pair.base, pair.inst), Sparse(pair.out, entries)
    dense.run_(lam)
    rows_of = shipped.groups[0].rows
    groups = {
        f"{kind} {launch.block}/{launch.threads}": sparse_triton.SparseTritonGroup(
            range(len(rows_of)), rows_of, launch
        )
        for launch in run.some(sparse_triton.CANDIDATES[kind])
    }
    shipped.run_(lam)
    for name, group in groups.items():
        group.lams.fill_(lam)
        pair.w.copy_(pair.b)  # what no position names is the base's
        group.launch_()
        pair.check(f"{name} at {density:.1%}", lam)
    positions, held = sum(entry.count for entry in entries), sum(entry.nbytes for entry in entries)

    def way(name: str, work: Work) -> Way:
        return Way(name, work, 1, held + 2 * positions, 2 + held / pair.count)

    ours = way(f"{kind} as shipped", shipped.launch_)
    ways = run.time(
        Way("dense", dense.launch_, 1, 3 * pair.nbytes, 6.0),
        ours,
        *(way(name, group.launch_) for name, group in groups.items()),
        ours.repeated,
    )
    case = f"sparse {density:.1%} of {format_large(pair.count)} bf16 weights"
    run.record("", case, ways.values(), "dense")
    run.choose(ways, ours.name, [*groups], f"sparse_triton.LAUNCHES[{kind!r}]")

"""Sparse sets at several densities, index lists and bitmaps, beside the dense switch of the same
weights."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, Sparse, SparseTensor, sparse_triton
from pa_kernels.sparse import Kind

from bench.gpu.pairs import Pair
from bench.gpu.run import Contender, Run

DENSITIES: dict[Kind, tuple[float, ...]] = {
    "index": (0.005, 0.02, 0.05),
    "bitmap": (0.06, 0.15, 0.30),
}
"""An index list is the smaller one up to 6 %."""


def sparse(run: Run) -> None:
    for kind, densities in DENSITIES.items():
        for density in run.some(densities):
            _of_density(run, kind, density)


def _of_density(run: Run, kind: Kind, density: float) -> None:
    stage = f"sparse {density:g}"
    sizes = [size for size in run.scale.sparse if size * 10 * len(run.scale.sparse) <= run.room()]
    if not sizes:
        run.ledger.say(stage, "left out: too little device memory is free")
        return
    pair = Pair.random(run, sizes)
    lam, entries, where = run.scale.lams[0], [], []
    for b, i in zip(pair.base, pair.inst):
        mask = torch.rand(b.numel(), device=run.device) < density
        i[~mask] = b[~mask]
        where.append(mask)
        entries.append(SparseTensor.encode(mask, b[mask], i[mask], b.numel(), kind=kind))
    del where
    dense, shipped = Lerp(pair.out, pair.base, pair.inst), Sparse(pair.out, entries)
    dense.run_(lam)
    rows_of = shipped.groups[0].rows
    groups = {
        f"{kind} {launch.block}/{launch.threads}": sparse_triton.Group(
            range(len(rows_of)), rows_of, launch
        )
        for launch in run.some(sparse_triton.CANDIDATES[kind])
    }
    shipped.run_(lam)
    for name, group in groups.items():
        group.lams.fill_(lam)
        pair.w.copy_(pair.b)  # what no position names is the base's
        group.launch_()
        pair.prove(f"{name} at {density:.1%}", lam)
    positions, held = sum(entry.count for entry in entries), sum(entry.nbytes for entry in entries)
    moved = held + 2 * positions
    kept = 2 + held / pair.count
    contenders = {
        "dense": Contender(3 * pair.w.nbytes, dense.launch_, 1, 6.0),
        f"{kind} as shipped": Contender(moved, shipped.launch_, 1, kept),
        **{name: Contender(moved, group.launch_, 1, kept) for name, group in groups.items()},
        f"{kind} as shipped, again": Contender(moved, shipped.launch_, 1, kept),
    }
    rows = run.time(stage, contenders, pair.count, "dense")
    run.choose(stage, rows, f"{kind} as shipped", [*groups], f"sparse_triton.LAUNCHES[{kind!r}]")

"""The dense switch with stochastic rounding, beside the one that rounds to nearest."""

from __future__ import annotations

from pa_kernels import Lerp, dense_triton
from pa_kernels.reference import Draw

from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from bench.run import Skip
from pa_fast.throughput.harness import Way, format_large


def stochastic(run: GpuRun) -> None:
    sizes = [size for size in run.scale.packed if size * 6 * len(run.scale.packed) <= run.room()]
    if not sizes:
        raise Skip("too little device memory is free")
    pair = FlatPair.random(run, sizes)
    lam, moved = run.scale.lams[0], 3 * pair.nbytes
    draws = [Draw(1000 + t) for t in range(len(sizes))]
    nearest = Lerp(pair.out, pair.base, pair.inst)
    shipped = Lerp(pair.out, pair.base, pair.inst, draws=draws)
    nearest.run_(lam)
    shipped.run_(lam)
    groups = {
        f"stochastic {launch.block}/{launch.threads}": dense_triton.DenseTritonGroup(
            range(len(sizes)), shipped.groups[0].rows, launch
        )
        for launch in run.some(dense_triton.CANDIDATES)
    }
    for name, group in groups.items():
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        pair.check(name, lam, draws)
    ours = Way("stochastic as shipped", shipped.launch_, moved_bytes=moved)
    ways = run.time(
        Way("nearest", nearest.launch_, moved_bytes=moved),
        ours,
        *(Way(name, group.launch_, moved_bytes=moved) for name, group in groups.items()),
        ours.repeated,
    )
    case = f"stochastic rounding of {format_large(pair.count)} bf16 weights"
    run.record("", case, ways.values(), "nearest")
    run.choose(ways, ours.name, [*groups], "the stochastic launch of dense_triton")

"""The dense switch with stochastic rounding, beside the one that rounds to nearest."""

from __future__ import annotations

from pa_kernels import Lerp, dense_triton
from pa_kernels.reference import Draw

from bench.gpu.pairs import Pair
from bench.gpu.run import Contender, Run


def stochastic(run: Run) -> None:
    sizes = [size for size in run.scale.packed if size * 6 * len(run.scale.packed) <= run.room()]
    if not sizes:
        run.ledger.say("stochastic", "left out: too little device memory is free")
        return
    pair = Pair.random(run, sizes)
    lam, moved = run.scale.lams[0], 3 * pair.w.nbytes
    draws = [Draw(1000 + t) for t in range(len(sizes))]
    nearest = Lerp(pair.out, pair.base, pair.inst)
    shipped = Lerp(pair.out, pair.base, pair.inst, draws=draws)
    nearest.run_(lam)
    shipped.run_(lam)
    groups = {
        f"stochastic {launch.block}/{launch.threads}": dense_triton.Group(
            range(len(sizes)), shipped.groups[0].rows, launch
        )
        for launch in run.some(dense_triton.CANDIDATES)
    }
    for name, group in groups.items():
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        pair.prove(name, lam, draws)
    contenders = {
        "nearest": Contender(moved, nearest.launch_),
        "stochastic as shipped": Contender(moved, shipped.launch_),
        **{name: Contender(moved, group.launch_) for name, group in groups.items()},
        "stochastic as shipped, again": Contender(moved, shipped.launch_),
    }
    rows = run.time("stochastic", contenders, pair.count, "nearest")
    run.choose(
        "stochastic",
        rows,
        "stochastic as shipped",
        [*groups],
        "the stochastic launch of dense_triton",
    )

"""Low-rank merges at several ranks with every tile, beside the dense switch of the same
matrices."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, LowRank, lowrank_triton, reference

from bench.gpu.run import GpuRun
from bench.run import Skip
from pa_fast.throughput.harness import Way, Work, format_large, require_bits, spots


def lowrank(run: GpuRun) -> None:
    for rank in run.some(run.scale.ranks):
        _of_rank(run, rank)


def _of_rank(run: GpuRun, rank: int) -> None:
    shapes = [
        shape
        for shape in run.scale.matrices
        if shape[0] * shape[1] * 10 * len(run.scale.matrices) <= run.room()
    ]
    if not shapes:
        raise Skip("too little device memory is free")
    lam = run.scale.lams[0]
    base = [run.random(*shape) for shape in shapes]
    inst, live = [run.random(*shape) for shape in shapes], [torch.empty_like(b) for b in base]
    u, v = (
        [run.random(m, rank, std=0.03) for m, _ in shapes],
        [run.random(rank, n, std=0.03) for _, n in shapes],
    )
    dense, shipped = Lerp(live, base, inst), LowRank(live, base, u, v)
    dense.run_(lam)
    shipped.run_(lam)
    rows_of = shipped.groups[0].rows
    columns = lowrank_triton.COLUMNS
    groups: dict[str, lowrank_triton.LowRankTritonGroup] = {}
    for launch in run.some(lowrank_triton.CANDIDATES):
        name = f"{launch.block // columns} × {columns}, {launch.threads} threads"
        groups[name] = lowrank_triton.LowRankTritonGroup(range(len(rows_of)), rows_of, launch)
    for name, group in groups.items():
        group.lams.fill_(lam)
        for w in live:
            w.fill_(9)
        group.launch_()
        _check(f"low rank {rank}, {name}", live, base, u, v, lam)
    count, factors = sum(w.numel() for w in live), sum(x.nbytes for x in (*u, *v))

    def way(name: str, work: Work, note: str = "") -> Way:
        kept = 4 + factors / count
        return Way(name, work, 1, 4 * count + factors, kept, note=note)

    ours = way("low rank as shipped", shipped.launch_, f"{2 * rank} operations a weight")
    ways = run.time(
        Way("dense", dense.launch_, 1, 6 * count, 6.0),
        ours,
        *(way(name, group.launch_) for name, group in groups.items()),
        way(
            "torch.addmm(out=) per matrix",
            lambda: [
                torch.addmm(b, x, y, alpha=lam, out=w) for w, b, x, y in zip(live, base, u, v)
            ],
        ),
        ours.repeated,
    )
    run.record("", f"low rank {rank} of {format_large(count)} weights", ways.values(), "dense")
    run.choose(ways, ours.name, [*groups], "lowrank_triton.LAUNCH")


def _check(
    what: str,
    live: list[torch.Tensor],
    base: list[torch.Tensor],
    u: list[torch.Tensor],
    v: list[torch.Tensor],
    lam: float,
) -> None:
    """Raise WrongBits unless rows are within 2⁻⁷ of the reference: sums have an order of their own
    on each device."""
    for t, span in spots([w.shape[0] for w in live]):
        rows = slice(span.start, min(span.start + 64, span.stop))
        for at in (rows, slice(max(span.stop - 64, 0), span.stop)):
            wanted = reference.lowrank(base[t][at].cpu(), u[t][at].cpu(), v[t].cpu(), lam).float()
            found = live[t][at].cpu().float()
            # where base and delta cancel it is 2⁻⁷ of the base that counts
            most = 2**-7 * torch.maximum(wanted.abs(), base[t][at].cpu().float().abs()) + 1e-6
            near = bool(((found - wanted).abs() <= most).all())
            require_bits(near, f"{what}: matrix {t}, rows {at.start} to {at.stop}")

"""The dense switch that records what it writes (P6): what the sums cost beside the switch alone,
with every launch; and with the read-back that proves memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pa_kernels import Checksum, Lerp, dense_triton
from pa_kernels.switch import Written

from bench.cases import TARGETS
from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from pa_fast.throughput.harness import Way, format_large, require_bits

NEAR = 1e-4
"""How far recorded products may be from those of fp64, as a share: they are summed in fp32 within a
tile."""


def recorded(run: GpuRun) -> None:
    pair = FlatPair.random(run, run.scale.sizes(run.layers(6)), 0.02)
    alone = Lerp(pair.out, pair.base, pair.inst)
    records = Lerp(pair.out, pair.base, pair.inst, records=True)
    memory = Checksum(pair.out)
    lam, three, four = run.scale.lams[0], 3 * pair.nbytes, 4 * pair.nbytes

    groups = {
        f"recorded {launch.block}/{launch.threads}": dense_triton.DenseTritonGroup(
            range(len(pair.out)), records.groups[0].rows, launch, records=True
        )
        for launch in run.some(dense_triton.CANDIDATES)
    }
    for name, group in {"as shipped": records.groups[0], **groups}.items():
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        _check(pair, name, lam, group.written(), memory)

    def proven() -> None:
        records.launch_()
        require_bits(
            [one.checksum for one in records.written()] == memory.sums(), "sums of a switch"
        )

    ours = Way("switch alone", alone.launch_, moved_bytes=three)
    shipped = Way("recorded as shipped", records.launch_, moved_bytes=three)
    ways = run.time(
        ours,
        shipped,
        *(Way(name, group.launch_, moved_bytes=three) for name, group in groups.items()),
        shipped.repeated,
        ours.repeated,
    )
    run.choose(ways, shipped.name, [*groups], "dense_triton.RECORDED_NARROW")
    # as its caller sees it: sums come to the host
    whole = run.time(
        Way("switch alone, waited for", alone.launch_, moved_bytes=three),
        Way("all of a λ but its evaluation", proven, moved_bytes=four),
        whole=True,
    )
    took = [whole[name].median_s for name in whole]
    run.record(
        "P6",
        f"recorded switch of {format_large(pair.count)} bf16 weights, {len(pair.out)} tensors",
        [*ways.values(), *whole.values()],
        ours.name,
        goal=TARGETS["P6"].gpu_goal,
        headline=(
            f"{ways[shipped.name].median_s / ways[ours.name].median_s:.2f} × the switch alone;"
            f" with its read-back {took[1] / took[0]:.2f} ×"
        ),
        met=took[1] <= 1.6 * took[0],
    )


def _check(
    pair: FlatPair, what: str, lam: float, written: Sequence[Written], memory: Checksum
) -> None:
    """Raise WrongBits unless the live tensors are W(λ), and `written` are their sums."""
    pair.check(what, lam)
    require_bits([one.checksum for one in written] == memory.sums(), f"sums of {what}")
    t = min(range(len(pair.sizes)), key=lambda t: pair.sizes[t])
    w, b, i = (side[t].double() for side in (pair.out, pair.base, pair.inst))
    expected = float(((w - b) * (i - b)).sum()), float(((i - b) ** 2).sum())
    found = written[t].products
    is_near = found is not None and all(
        math.isclose(one, other, rel_tol=NEAR) for one, other in zip(found, expected)
    )
    require_bits(is_near, f"products of {what}: {found} for {expected}")

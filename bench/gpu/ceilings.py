"""What the machine can do at all, measured in the same run: the figures that all others are shares
of."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, dense_triton

from bench.gpu.pairs import Pair
from bench.gpu.run import Contender, Run


def ceilings(run: Run) -> None:
    """Device copy, torch.add and torch.lerp over flat buffers, our kernel on one flat tensor with
    every launch, PCIe.

    The stream is the best of those that read two buffers and write one, whoever wrote its kernel.
    """
    count = min(sum(run.scale.sizes(run.scale.layers)), run.room() // 6)
    pair = Pair.random(run, [count])
    lam = run.scale.lams[0]
    two, three = 2 * pair.w.nbytes, 3 * pair.w.nbytes
    contenders = {
        "device copy": Contender(two, lambda: pair.w.copy_(pair.b)),
        "flat torch.add": Contender(three, lambda: torch.add(pair.b, pair.i, out=pair.w)),
        "flat torch.lerp": Contender(three, lambda: torch.lerp(pair.b, pair.i, lam, out=pair.w)),
    }
    streams = ["flat torch.add", "flat torch.lerp"]
    (shipped,) = Lerp(pair.out, pair.base, pair.inst).groups
    for launch in run.some(dense_triton.CANDIDATES):
        group = dense_triton.Group([0], shipped.rows, launch)
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        pair.prove(f"flat lerp {launch}", lam)
        name = f"ours on one tensor {launch.block}/{launch.threads}"
        contenders[name] = Contender(three, group.launch_)
        streams.append(name)
    contenders["device copy, again"] = contenders["device copy"]
    rows = run.time("ceilings", contenders, count, "device copy")
    run.copy_gbps = max(rows[name].gbps or 0 for name in ("device copy", "device copy, again"))
    best = max(streams, key=lambda name: rows[name].gbps or 0)
    run.stream_gbps = rows[best].gbps or 0
    run.ledger.say(
        "ceilings",
        f"copy {run.copy_gbps:.0f} GB/s; the stream is {best}, {run.stream_gbps:.0f} GB/s",
    )

"""Switches recorded in a CUDA graph: the same bits at a replay, and what a launch costs beside
one."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, Packed, PackedTensor
from pa_kernels.switch import Switch

from bench.gpu.clock import Work, wall_seconds
from bench.gpu.pairs import Pair
from bench.gpu.run import Contender, Run

TIMES = 100
"""Switches in a row: what a host spends on each shows where it cannot keep the device busy."""


def graph(run: Run) -> None:
    pair = Pair.random(run, list(run.scale.small), 0.017)
    first, second = run.scale.lams
    entries = [PackedTensor.encode(b, i, width=8) for b, i in zip(pair.base, pair.inst)]
    packed = Packed(pair.out, [entry for entry in entries if entry is not None])
    pair.w.copy_(pair.b)
    packed.holds(0.0)
    contenders, times = {}, 1 if run.rehearsal else TIMES
    for name, switch in {"packed": packed, "dense": Lerp(pair.out, pair.base, pair.inst)}.items():
        switch.run_(first)
        replay = recorded(run, switch)
        for lam in (second, 0.0, 1.0, first):
            for group in switch.groups:
                group.lams.fill_(lam)
            replay()
            pair.prove(f"a graph of {name} switches", lam)
        moved = (
            3 * pair.w.nbytes
            if name == "dense"
            else 2 * pair.w.nbytes + sum(e.nbytes for e in entries if e)
        )

        def again(work: Work) -> Work:
            return lambda: [work() for _ in range(times)]

        contenders[f"{name} launched"] = Contender(moved, again(switch.launch_), times)
        contenders[f"{name} with its λ set"] = Contender(
            moved, again(lambda switch=switch: switch.run_(first)), times
        )
        contenders[f"{name} replayed"] = Contender(moved, again(replay), times)
    contenders["dense launched, again"] = contenders["dense launched"]
    rows = run.time("graph", contenders, pair.count, "dense launched", clock=wall_seconds)
    saved = (
        (rows[f"{name} launched"].ms or 0) - (rows[f"{name} replayed"].ms or 0)
        for name in ("dense", "packed")
    )
    run.ledger.say(
        "graph",
        "a replay saves "
        + " and ".join(f"{1000 * ms:.1f} µs" for ms in saved)
        + " of a dense and a packed switch",
    )


def recorded(run: Run, switch: Switch) -> Work:
    """What replays `switch.launch_`; the launch itself where there is no GPU to record on."""
    if run.rehearsal:
        return switch.launch_
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        switch.launch_()
    return made.replay

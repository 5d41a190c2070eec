"""Switches recorded in a CUDA graph: the same bits at a replay, and what a launch costs beside
one."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, Packed, PackedTensor
from pa_kernels.switch import Switch

from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from pa_fast.throughput.harness import Way, Work

TIMES = 100
"""Switches in a row: what a host spends on each shows where it cannot keep the device busy."""


def graph(run: GpuRun) -> None:
    pair = FlatPair.random(run, list(run.scale.small), 0.017)
    first, second = run.scale.lams
    entries = [PackedTensor.encode(b, i, width=8) for b, i in zip(pair.base, pair.inst)]
    packed = Packed(pair.out, [entry for entry in entries if entry is not None])
    pair.w.copy_(pair.b)
    packed.holds(0.0)
    ways, times = [], 1 if run.rehearsal else TIMES
    for name, switch in {"packed": packed, "dense": Lerp(pair.out, pair.base, pair.inst)}.items():
        switch.run_(first)
        replay = recorded(run, switch)
        for lam in (second, 0.0, 1.0, first):
            for group in switch.groups:
                group.lams.fill_(lam)
            replay()
            pair.check(f"a graph of {name} switches", lam)
        codes = sum(entry.nbytes for entry in entries if entry)
        moved = 3 * pair.nbytes if name == "dense" else 2 * pair.nbytes + codes
        works = {
            "launched": switch.launch_,
            "with its λ set": lambda switch=switch: switch.run_(first),
            "replayed": replay,
        }
        ways += [
            Way(f"{name} {how}", _repeated(work, times), times, moved)
            for how, work in works.items()
        ]
    again = next(way.repeated for way in ways if way.name == "dense launched")
    found = run.time(*ways, again, whole=True)
    case = f"launches of switches of {len(pair.sizes)} small tensors"
    run.record("", case, found.values(), "dense launched")
    saved = (
        found[f"{name} launched"].median_s - found[f"{name} replayed"].median_s
        for name in ("dense", "packed")
    )
    run.note(
        "a replay saves "
        + " and ".join(f"{1e6 * seconds:.1f} µs" for seconds in saved)
        + " of a dense and a packed switch"
    )


def _repeated(work: Work, times: int) -> Work:
    return lambda: [work() for _ in range(times)]


def recorded(run: GpuRun, switch: Switch) -> Work:
    """What replays `switch.launch_`; the launch itself where there is no GPU to record on."""
    if run.rehearsal:
        return switch.launch_
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        switch.launch_()
    return made.replay

"""What the machine can do at all, measured in the same run: the figures that all others are shares
of."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, dense_triton

from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from pa_fast.throughput.harness import Way, format_large


def ceilings(run: GpuRun) -> None:
    """Device copy, torch.add and torch.lerp over flat buffers, our kernel on one flat tensor with
    every launch.

    The stream is the best of those that read two buffers and write one, whoever wrote its kernel.
    """
    count = min(sum(run.scale.sizes(run.scale.layers)), run.room() // 6)
    pair = FlatPair.random(run, [count])
    w, b, i, lam, three = pair.w, pair.b, pair.i, run.scale.lams[0], 3 * pair.nbytes
    copy = Way("device copy", lambda: w.copy_(b), moved_bytes=2 * pair.nbytes)
    streams = [
        Way("flat torch.add", lambda: torch.add(b, i, out=w), moved_bytes=three),
        Way("flat torch.lerp", lambda: torch.lerp(b, i, lam, out=w), moved_bytes=three),
    ]
    (shipped,) = Lerp(pair.out, pair.base, pair.inst).groups
    for launch in run.some(dense_triton.CANDIDATES):
        group = dense_triton.DenseTritonGroup([0], shipped.rows, launch)
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        name = f"ours on one tensor {launch.block}/{launch.threads}"
        pair.check(name, lam)
        streams.append(Way(name, group.launch_, moved_bytes=three))
    ways = run.time(copy, *streams, copy.repeated)
    rates = {name: way.gbps or 0 for name, way in ways.items()}
    best = max((stream.name for stream in streams), key=lambda name: rates[name])
    run.ceilings.update(copy=max(rates[copy.name], rates[copy.repeated.name]), stream=rates[best])
    run.record("", f"ceilings of {format_large(count)} bf16 weights", ways.values(), copy.name)
    run.note(
        f"copy {run.ceilings['copy']:.0f} GB/s; the stream is {best},"
        f" {run.ceilings['stream']:.0f} GB/s"
    )

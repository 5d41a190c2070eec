"""Dense switches whose sources lie in pinned host memory, beside what a copy from there reaches
(P4)."""

from __future__ import annotations

import contextlib

import torch
from pa_kernels import Lerp, dense_triton
from pa_kernels.tiles import Launch
from torch import Tensor

from bench.cases import TARGETS
from bench.gpu import persistent
from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from pa_fast.throughput.harness import Way, format_large

LAUNCHES = (
    Launch(1024, 128),
    Launch(2048, 128),
    Launch(4096, 128),
    Launch(4096, 256),
    Launch(8192, 256),
)
PROGRAMS = (0.25, 1, 4)
"""Programs a multiprocessor that stay: 0.25 of them have 270 kB in flight on 132
multiprocessors."""


def host(run: GpuRun) -> None:
    count = min(run.scale.host, run.room() // 12)
    pair = FlatPair.random(run, [count])
    b, i = (side.cpu() if run.rehearsal else side.cpu().pin_memory() for side in (pair.b, pair.i))
    lam = run.scale.lams[0]
    read = 2 * b.nbytes
    shipped = Lerp([pair.w], [b], [i])
    rows_of = shipped.groups[0].rows
    groups: dict[str, dense_triton.DenseTritonGroup] = {}
    for launch in run.some(LAUNCHES):
        groups[f"pointers, {launch.block}/{launch.threads}"] = dense_triton.DenseTritonGroup(
            [0], rows_of, launch
        )
    for each in run.some(PROGRAMS):
        launch, programs = dense_triton.NARROW, max(int(each * run.multiprocessors), 1)
        name = f"pointers, {launch.block}/{launch.threads}, {programs} programs"
        groups[name] = persistent.PersistentGroup([0], rows_of, launch, programs=programs)
    staged = Staged(pair.w, b, i, run.scale.chunk)
    shipped.run_(lam)
    for group in groups.values():
        group.lams.fill_(lam)
    works = {name: group.launch_ for name, group in groups.items()}
    works |= {"staged copies": lambda: staged.run_(lam)}
    ways = [Way("pointers as shipped", shipped.launch_, moved_bytes=read)]
    ways += [Way(name, work, moved_bytes=read) for name, work in works.items()]
    for way in ways:
        pair.poison()
        assert way.work is not None
        way.work()
        pair.check(f"host {way.name}", lam)
    copy = Way(
        "pinned copy to the device",
        lambda: pair.b.copy_(b, non_blocking=True),
        moved_bytes=b.nbytes,
    )
    found = run.time(copy, *ways, copy.repeated, ways[0].repeated)
    best = run.choose(found, ways[0].name, [*works], "the launch for pinned sources")
    ceiling = max(found[name].gbps or 0 for name in (copy.name, copy.repeated.name))
    share, as_is = ((found[name].gbps or 0) / ceiling for name in (best, ways[0].name))
    run.record(
        "P4",
        f"{format_large(count)} bf16 weights in pinned memory, bytes over the bus",
        found.values(),
        copy.name,
        goal=TARGETS["P4"].gpu_goal,
        headline=f"{best}: {share:.1%} of {ceiling:.1f} GB/s; as shipped {as_is:.1%}",
        met=share >= 0.9,
    )


class Staged:
    """The other way: chunks of both sources copied to the device, two on their way while a third is
    merged."""

    def __init__(self, w: Tensor, b: Tensor, i: Tensor, chunk: int):
        self.pieces = list(zip(w.split(chunk), b.split(chunk), i.split(chunk)))
        self.device = w.device
        self.streams = (
            [torch.cuda.Stream(w.device) for _ in range(3)] if w.device.type == "cuda" else []
        )
        self.buffers = [
            (torch.empty_like(w[:chunk]), torch.empty_like(w[:chunk])) for _ in range(3)
        ]
        self.merges = [
            Lerp([w], [b[: w.numel()]], [i[: w.numel()]])
            for n, (w, _, _) in enumerate(self.pieces)
            for b, i in [self.buffers[n % 3]]
        ]

    def run_(self, lam: float) -> None:
        """Rewrite the live tensor for λ."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        for n, (w, b, i) in enumerate(self.pieces):
            # what follows in one stream runs in order, so a buffer is free before it is filled
            # again
            with (
                torch.cuda.stream(self.streams[n % 3]) if self.streams else contextlib.nullcontext()
            ):
                for buffer, source in zip(self.buffers[n % 3], (b, i)):
                    buffer[: w.numel()].copy_(source, non_blocking=True)
                self.merges[n].run_(lam)
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)

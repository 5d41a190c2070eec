"""The checksum of a model's live tensors: the launch of its kernel, and a whole call as the driver
makes it."""

from __future__ import annotations

import torch
from pa_kernels import checksum as checksum_of
from pa_kernels import checksum_triton, reference, tiles
from pa_kernels.reference import CHECKSUM_VERSION

from bench.gpu.run import GpuRun
from pa_fast.throughput.harness import Way, format_large, require_bits


def checksum(run: GpuRun) -> None:
    sizes = run.scale.sizes(run.layers(2))
    live = list(run.random(sum(sizes)).split(sizes))
    flat = [tensor.view(torch.uint8) for tensor in live]
    moved = sum(tensor.nbytes for tensor in live)
    smallest = min(range(len(live)), key=lambda t: sizes[t])
    expected = checksum_of(live)
    wanted = reference.checksum(live[smallest].cpu())
    require_bits(expected[smallest] == wanted, f"checksum of tensor {smallest}")

    def way(name: str, launch: tiles.Launch) -> Way:
        group = checksum_triton.ChecksumTritonGroup(flat, CHECKSUM_VERSION, launch)
        group.launch_()
        sums = group.totals.tolist()
        require_bits(sums == [_signed(total) for total in expected], f"checksum with {launch}")
        return Way(name, group.launch_, moved_bytes=moved)

    shipped = way("as shipped", checksum_triton.LAUNCH)
    candidates = [
        way(f"{launch.block}/{launch.threads}", launch)
        for launch in run.some(checksum_triton.CANDIDATES)
    ]
    whole = Way("whole call", lambda: checksum_of(live), moved_bytes=moved)
    ways = run.time(whole, shipped, *candidates, shipped.repeated)
    case = f"checksum of {format_large(sum(sizes))} bf16 weights"
    run.record("", case, ways.values(), shipped.name)
    names = [candidate.name for candidate in candidates]
    run.choose(ways, shipped.name, names, "checksum_triton.LAUNCH")
    spent_s = ways[whole.name].median_s - ways[shipped.name].median_s
    run.note(f"tables and waiting take {1000 * spent_s:.2f} ms of a whole call")


def _signed(total: int) -> int:
    return (total + 2**63) % 2**64 - 2**63

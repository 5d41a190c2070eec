"""The checksum of a model's live tensors: the launch of its kernel, and a whole call as the driver
makes it."""

from __future__ import annotations

import math

import torch
from pa_kernels import checksum as checksum_of
from pa_kernels import checksum_triton, reference, tiles

from bench.gpu.proof import WrongBits
from bench.gpu.run import Contender, Run


def checksum(run: Run) -> None:
    layers = run.scale.layers_for(run.room(), 2)
    sizes = run.scale.sizes(layers)
    if not layers:
        run.ledger.say(
            "checksum", "left out: not one layer of an 8B model fits the device memory that is free"
        )
        return
    live = list(run.random(sum(sizes)).split(sizes))
    flat = [tensor.view(torch.uint8) for tensor in live]
    count, moved = sum(sizes), sum(tensor.nbytes for tensor in live)
    smallest = min(range(len(live)), key=lambda t: sizes[t])
    expected = checksum_of(live)
    if expected[smallest] != reference.checksum(live[smallest].cpu()):
        raise WrongBits(f"checksum: of tensor {smallest}")
    contenders = {"whole call": Contender(moved, lambda: checksum_of(live))}
    for launch in (checksum_triton.LAUNCH, *run.some(checksum_triton.CANDIDATES)):
        if checksum_triton.sums(flat, launch) != [_signed(total) for total in expected]:
            raise WrongBits(f"checksum with {launch}")
        table = tiles.build([flat], [data.numel() for data in flat], 8 * launch.block)
        totals = torch.zeros(len(flat), dtype=torch.int64, device=run.device)
        name = (
            "as shipped" if "as shipped" not in contenders else f"{launch.block}/{launch.threads}"
        )
        contenders[name] = Contender(
            moved,
            lambda totals=totals, table=table, launch=launch: checksum_triton.add_(
                totals, table, launch
            ),
        )
    contenders["as shipped, again"] = contenders["as shipped"]
    rows = run.time("checksum", contenders, count, "as shipped")
    names = [f"{launch.block}/{launch.threads}" for launch in run.some(checksum_triton.CANDIDATES)]
    run.choose("checksum", rows, "as shipped", names, "checksum_triton.LAUNCH")
    spent = (rows["whole call"].ms or math.nan) - (rows["as shipped"].ms or math.nan)
    run.ledger.say("checksum", f"tables and waiting take {spent:.2f} ms of a whole call")


def _signed(total: int) -> int:
    return (total + 2**63) % 2**64 - 2**63

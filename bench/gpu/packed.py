"""Packed switches, both checksums included, with codes of both widths, beside dense ones of the
same weights (P3)."""

from __future__ import annotations

import math

from pa_kernels import Lerp, Packed, PackedTensor
from pa_kernels.packed import triton as packed_triton

from bench.gpu.pairs import Pair
from bench.gpu.proof import WrongBits
from bench.gpu.run import Contender, Run

GOALS = {0.017: 3.2, 0.044: 3.52}
"""Bytes per weight in all that a delta of so many times the base's norm may take."""


def packed(run: Run) -> None:
    for relative, most in run.some(GOALS.items()):
        _of_pair(run, relative, most)


def _of_pair(run: Run, relative: float, most: float) -> None:
    stage = f"packed {relative:g}"
    sizes = _fitting(run)
    if not sizes:
        run.ledger.say(stage, "left out: not one tensor fits the device memory that is free")
        return
    pair = Pair.random(run, sizes, relative)
    out, aside = pair.out, run.random(pair.count)
    first, second = run.scale.lams
    dense = Lerp(out, pair.base, pair.inst)

    def there_and_back(switch: Lerp | Packed) -> None:
        # ends where it began, so that all of them can take turns on the same live tensors
        switch.run_(second)
        switch.run_(first)

    kept = {"dense": 6.0}
    contenders = {"dense": Contender(3 * pair.w.nbytes, lambda: there_and_back(dense), 2, 6.0)}
    switches: dict[str, Packed] = {}
    for width in (8, 16):
        entries = [PackedTensor.encode(b, i, width=width) for b, i in zip(pair.base, pair.inst)]
        made = [entry for entry in entries if entry is not None]
        if len(made) < len(entries):
            run.ledger.say(stage, f"codes of {width} bits left out: exceptions outnumber a tensor")
            continue
        held = sum(entry.nbytes for entry in made)
        for launch in run.some(packed_triton.CANDIDATES):
            name = f"packed {width}-bit, {launch.threads} threads"
            switch = Packed(out, made)
            switch.groups = tuple(
                packed_triton.Group(group.entries, group.rows, launch) for group in switch.groups
            )
            pair.w.copy_(pair.b)
            switch.holds(0.0)
            for lam in (second, first):
                switch.run_(lam)
                pair.prove(name, lam)
            kept[name] = 2 + held / pair.count
            switches[name] = switch
            contenders[name] = Contender(
                2 * pair.w.nbytes + held,
                lambda switch=switch: there_and_back(switch),
                2,
                kept[name],
            )
    contenders["device copy"] = Contender(2 * pair.w.nbytes, lambda: aside.copy_(pair.b))
    contenders["dense, again"] = contenders["dense"]
    rows = run.time(stage, contenders, pair.count, "dense")
    for name, switch in switches.items():
        # its own sums, of every switch that was timed: nobody found what another had not left
        if switch.wrong():
            raise WrongBits(f"{name}: sums differ from those of the switch before")
    pair.prove(stage, first)
    if not switches:
        return
    smallest = min(kept[name] for name in switches)
    names = [name for name in switches if kept[name] == smallest]
    best = min(names, key=lambda name: rows[name].ms or math.inf)
    ratio = rows[best].ratio or math.nan
    run.ledger.verdict(
        stage,
        "P3",
        f"r = {relative:g}, checksums included: ≤ 1.25 × dense at ≤ {most:g} bytes per weight",
        f"{best}: {ratio:.2f} × at {smallest:.3f}",
        ratio <= 1.25 and smallest <= most,
    )


def _fitting(run: Run) -> list[int]:
    """As many of the tensors as fit: live, two sides and a spare, codes of both widths, and what
    encoding takes for a while."""
    room, sizes = run.room() // 16, []
    for size in run.scale.packed:
        if size <= room:
            sizes.append(size)
            room -= size
    return sizes

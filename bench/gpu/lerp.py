"""The dense switch of an 8B model (P1) with every launch, and what PyTorch offers for it (P2)."""

from __future__ import annotations

import math

import torch
from pa_kernels import Lerp, checksum, dense_triton
from pa_kernels.tiles import Launch

from bench.gpu import persistent
from bench.gpu.pairs import Pair
from bench.gpu.proof import WrongBits
from bench.gpu.run import Contender, Run

PROGRAMS = (4, 8, 16)
"""Programs a multiprocessor of the persistent candidates."""


def lerp(run: Run) -> None:
    layers = run.scale.layers_for(run.room(), 6)
    if not layers:
        run.ledger.say(
            "lerp", "left out: not one layer of an 8B model fits the device memory that is free"
        )
        return
    pair = Pair.random(run, run.scale.sizes(layers))
    lam = run.scale.lams[0]
    out, base, inst = pair.out, pair.base, pair.inst
    ours, theirs = 3 * pair.w.nbytes, 5 * pair.w.nbytes
    torch.lerp(pair.b, pair.i, lam, out=pair.w)
    # normal weights of two draws are nowhere −0 on both sides, which is all that torch.lerp does
    # otherwise
    whole = checksum([pair.w])

    shipped = Lerp(out, base, inst)
    groups: dict[str, dense_triton.Group] = {}
    entries, rows_of = range(len(out)), shipped.groups[0].rows
    for launch in run.some(dense_triton.CANDIDATES):
        groups[_name(launch)] = dense_triton.Group(entries, rows_of, launch)
    for each in run.some(PROGRAMS):
        launch, programs = dense_triton.NARROW, each * run.multiprocessors
        name = f"{_name(launch)}, {each} programs a multiprocessor"
        groups[name] = persistent.Group(entries, rows_of, launch, programs=programs)
    shipped.run_(lam)
    for name, group in groups.items():
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        pair.prove(name, lam)
        if checksum([pair.w]) != whole:
            raise WrongBits(
                f"{name}: not the bits of torch.lerp, somewhere between the places that were"
                " looked at"
            )
    contenders = {
        "ours as shipped": Contender(ours, shipped.launch_),
        **{name: Contender(ours, group.launch_) for name, group in groups.items()},
        "torch.lerp(out=) per tensor": Contender(
            ours, lambda: [torch.lerp(b, i, lam, out=w) for w, b, i in zip(out, base, inst)]
        ),
        "copy_(torch.lerp()) per tensor": Contender(
            theirs, lambda: [w.copy_(torch.lerp(b, i, lam)) for w, b, i in zip(out, base, inst)]
        ),
        "copy_ + _foreach_lerp_": Contender(
            theirs, lambda: (torch._foreach_copy_(out, base), torch._foreach_lerp_(out, inst, lam))
        ),
        "device copy": Contender(2 * pair.w.nbytes, lambda: pair.w.copy_(pair.b)),
        "ours as shipped, again": Contender(ours, shipped.launch_),
    }
    rows = run.time("lerp", contenders, pair.count, "ours as shipped")
    best = run.choose("lerp", rows, "ours as shipped", [*groups], "dense_triton.NARROW")
    tuned = rows[best].gbps or math.nan
    stream, copy = (
        tuned / run.stream_gbps,
        tuned / max(run.copy_gbps, rows["device copy"].gbps or 0),
    )
    as_is = rows["ours as shipped"].gbps or math.nan
    run.ledger.verdict(
        "lerp",
        "P1",
        "≥ 97 % of a flat 2-read-1-write stream, ≥ 100 % of device copy",
        f"{best}: {stream:.1%} and {copy:.1%}; as shipped {as_is / run.stream_gbps:.1%}",
        stream >= 0.97 and copy >= 1,
    )
    limits = {
        "copy_ + _foreach_lerp_": 1.3,
        "copy_(torch.lerp()) per tensor": 1.5,
        "torch.lerp(out=) per tensor": 1.0,
    }
    times = {
        name: (rows[name].ms or 0) / (rows["ours as shipped"].ms or math.nan) for name in limits
    }
    run.ledger.verdict(
        "lerp",
        "P2",
        "≥ " + ", ".join(f"{limit} × {name}" for name, limit in limits.items()),
        ", ".join(f"{ratio:.2f} ×" for ratio in times.values()),
        all(times[name] >= limits[name] for name in limits),
    )


def _name(launch: Launch) -> str:
    return f"ours {launch.block}/{launch.threads}"

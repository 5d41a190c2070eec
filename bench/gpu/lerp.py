"""The dense switch of an 8B model (P1) with every launch, and what PyTorch offers for it (P2)."""

from __future__ import annotations

import math

import torch
from pa_kernels import Lerp, checksum, dense_triton
from pa_kernels.tiles import Launch

from bench.cases import TARGETS
from bench.gpu import persistent
from bench.gpu.run import GpuRun
from bench.pairs import FlatPair
from pa_fast.throughput.harness import Way, format_large, require_bits

PROGRAMS = (4, 8, 16)
"""Programs a multiprocessor of the persistent candidates."""

LIMITS = {
    "copy_ + _foreach_lerp_": 1.3,
    "copy_(torch.lerp()) per tensor": 1.5,
    "torch.lerp(out=) per tensor": 1.0,
}
"""How many times the time of ours each of PyTorch's ways is to take."""


def lerp(run: GpuRun) -> None:
    pair = FlatPair.random(run, run.scale.sizes(run.layers(6)))
    lam, three, five = run.scale.lams[0], 3 * pair.nbytes, 5 * pair.nbytes
    out, base, inst = pair.out, pair.base, pair.inst
    torch.lerp(pair.b, pair.i, lam, out=pair.w)
    # normal weights of two draws are nowhere −0 on both sides, which is all that torch.lerp does
    # otherwise
    whole = checksum([pair.w])

    shipped = Lerp(out, base, inst)
    groups: dict[str, dense_triton.DenseTritonGroup] = {}
    entries, rows_of = range(len(out)), shipped.groups[0].rows
    for launch in run.some(dense_triton.CANDIDATES):
        groups[_name(launch)] = dense_triton.DenseTritonGroup(entries, rows_of, launch)
    for each in run.some(PROGRAMS):
        launch, programs = dense_triton.NARROW, each * run.multiprocessors
        name = f"{_name(launch)}, {each} programs a multiprocessor"
        groups[name] = persistent.PersistentGroup(entries, rows_of, launch, programs=programs)
    shipped.run_(lam)
    for name, group in groups.items():
        group.lams.fill_(lam)
        pair.poison()
        group.launch_()
        pair.check(name, lam)
        require_bits(checksum([pair.w]) == whole, f"{name}, between the places looked at")
    ours = Way("ours as shipped", shipped.launch_, moved_bytes=three)
    ways = run.time(
        ours,
        *(Way(name, group.launch_, moved_bytes=three) for name, group in groups.items()),
        Way(
            "torch.lerp(out=) per tensor",
            lambda: [torch.lerp(b, i, lam, out=w) for w, b, i in zip(out, base, inst)],
            moved_bytes=three,
        ),
        Way(
            "copy_(torch.lerp()) per tensor",
            lambda: [w.copy_(torch.lerp(b, i, lam)) for w, b, i in zip(out, base, inst)],
            moved_bytes=five,
        ),
        Way(
            "copy_ + _foreach_lerp_",
            lambda: (torch._foreach_copy_(out, base), torch._foreach_lerp_(out, inst, lam)),
            moved_bytes=five,
        ),
        Way("device copy", lambda: pair.w.copy_(pair.b), moved_bytes=2 * pair.nbytes),
        ours.repeated,
    )
    best = run.choose(ways, ours.name, [*groups], "dense_triton.NARROW")
    case = f"switch of {format_large(pair.count)} bf16 weights, {len(out)} tensors"
    stream = run.ceilings.get("stream", math.nan)
    copy = max(run.ceilings.get("copy", 0), ways["device copy"].gbps or 0)
    tuned, as_is = (ways[name].gbps or 0 for name in (best, ours.name))
    run.record(
        "P1",
        case,
        ways.values(),
        ours.name,
        goal=TARGETS["P1"].gpu_goal,
        headline=(
            f"{best}: {tuned / stream:.1%} and {tuned / copy:.1%}; as shipped {as_is / stream:.1%}"
        ),
        met=tuned >= 0.97 * stream and tuned >= copy,
    )
    times = {name: ways[name].median_s / ways[ours.name].median_s for name in LIMITS}
    run.record(
        "P2",
        case,
        [ways[name] for name in (ours.name, ours.repeated.name, *LIMITS)],
        ours.name,
        goal=TARGETS["P2"].gpu_goal,
        headline=", ".join(f"{ratio:.2f} ×" for ratio in times.values()),
        met=all(times[name] >= limit for name, limit in LIMITS.items()),
    )


def _name(launch: Launch) -> str:
    return f"ours {launch.block}/{launch.threads}"

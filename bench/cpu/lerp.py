"""The dense switch on a CPU (P5), against what torch does with the same bytes in one flat piece,
and tensor by tensor."""

from __future__ import annotations

from dataclasses import replace

import torch
from pa_kernels import Lerp, reference

from bench.cases import OPS
from bench.pairs import FlatPair
from bench.run import Run
from pa_fast.throughput.harness import Way, require_bits

CASE, LAM = OPS["lerp"], 0.3


def lerp(run: Run) -> None:
    for dtype in CASE.dtypes:
        _of_dtype(run, dtype)


def _of_dtype(run: Run, dtype: str) -> None:
    pair = FlatPair.drawn(CASE.size, dtype)
    live, b, i, out, base, inst = pair.w, pair.b, pair.i, pair.out, pair.base, pair.inst
    switch = Lerp(out, base, inst)
    switch.run_(LAM)
    pair.check("pa_kernels.Lerp", LAM)
    expected = live.clone()
    three, five = 3 * b.nbytes, 5 * b.nbytes
    flat = Way(
        "one flat torch.lerp(out=)", lambda: torch.lerp(b, i, LAM, out=live), moved_bytes=three
    )
    ours = Way("pa_kernels.Lerp", lambda: switch.run_(LAM), moved_bytes=three)
    others = [
        Way(
            "torch.lerp(out=) per tensor",
            lambda: [torch.lerp(x, y, LAM, out=w) for w, x, y in zip(out, base, inst)],
            moved_bytes=three,
        ),
        Way(
            "copy_(torch.lerp()) per tensor",
            lambda: [w.copy_(torch.lerp(x, y, LAM)) for w, x, y in zip(out, base, inst)],
            moved_bytes=five,
        ),
        Way(
            "_foreach_copy_, _foreach_lerp_",
            lambda: (torch._foreach_copy_(out, base), torch._foreach_lerp_(out, inst, LAM)),
            moved_bytes=five,
        ),
    ]
    ways = []
    for way in (flat, ours, ours.repeated, *others):
        pair.poison()
        assert way.work is not None
        way.work()
        wrong = 1 - reference.same_bits(live, expected).float().mean().item()
        require_bits(not wrong or way.name != ours.name, ours.name)
        ways.append(replace(way, wrong_share=wrong))
    copy = Way("copy of one side", lambda: live.copy_(b), moved_bytes=2 * b.nbytes)
    found = CASE.time(*ways, copy)
    share, gbps = found[flat.name].median_s / found[ours.name].median_s, found[ours.name].gbps
    run.record(
        CASE.target,
        f"switch of {pair}",
        found.values(),
        flat.name,
        goal=CASE.goal,
        headline=f"{share:.1%} of one flat `torch.lerp(out=)`, {gbps:.1f} GB/s",
    )

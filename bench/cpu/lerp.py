"""The dense switch on a CPU (P5), against what torch does with the same bytes in one flat piece,
and tensor by tensor."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import torch
from pa_kernels import Lerp, reference
from torch import Tensor

from bench.cases import OPS
from bench.fragments import fragmented
from bench.pairs import FlatPair
from bench.run import Run
from pa_fast.live.memory import empty_live
from pa_fast.throughput.harness import Way, require_bits

CASE, LAM, CPU = OPS["lerp"], 0.3, torch.device("cpu")


def lerp(run: Run) -> None:
    for dtype in CASE.dtypes:
        _of_dtype(run, dtype)
    _by_allocation(run)


def _of_dtype(run: Run, dtype: str) -> None:
    pair = FlatPair.drawn(CASE.size, dtype)
    live, b, i, base, inst = pair.w, pair.b, pair.i, pair.base, pair.inst
    out = empty_live(pair.out, CPU)  # as `pa_fast.load` allocates
    switch = Lerp(out, base, inst)
    switch.run_(LAM)
    pair.check("pa_kernels.Lerp", LAM, out=out)
    expected = torch.cat(out)
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
        written = [live] if way is flat else out
        for tensor in written:
            tensor.fill_(9)
        assert way.work is not None
        way.work()
        wrong = 1 - reference.same_bits(torch.cat(written), expected).float().mean().item()
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


def _by_allocation(run: Run) -> None:
    """The same switch where live tensors lie together, as `pa_fast.load` allocates them, and where
    each was allocated by itself, in memory as it is and in fragments."""
    pair = FlatPair.drawn(CASE.size, "bfloat16")
    moved = 3 * pair.nbytes

    def switch_of(name: str, out: list[Tensor]) -> Way:
        switch = Lerp(out, pair.base, pair.inst)
        switch.run_(LAM)
        pair.check(name, LAM, out=out)
        return Way(name, lambda: switch.run_(LAM), moved_bytes=moved)

    def one_by_one() -> list[Tensor]:
        return [torch.empty_like(tensor) for tensor in pair.out]

    flat = Way(
        "one flat torch.lerp(out=)",
        lambda: torch.lerp(pair.b, pair.i, LAM, out=pair.w),
        moved_bytes=moved,
    )
    together = switch_of("together", empty_live(pair.out, CPU))
    apart = switch_of("one by one", one_by_one())
    ways = [flat, together, together.repeated, apart]
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux":
            stack.enter_context(fragmented(2 * pair.nbytes))
            ways += [
                switch_of("together, fragmented", empty_live(pair.out, CPU)),
                switch_of("one by one, fragmented", one_by_one()),
            ]
        found = CASE.time(*ways)
    times = {name: way.median_s for name, way in found.items()}
    whole = times["together"]
    ratios = [
        f"{name} {times[name] / whole:.2f} ×"
        for name in times
        if name not in (flat.name, "together")
    ]
    run.record(
        CASE.target,
        f"switch of {pair}, by allocation",
        found.values(),
        flat.name,
        goal=CASE.goal,
        headline=(
            f"{times[flat.name] / whole:.1%} of one flat `torch.lerp(out=)`; {', '.join(ratios)}"
        ),
    )

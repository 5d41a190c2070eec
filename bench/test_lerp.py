"""The dense switch on a CPU (P5), against what torch does with the same bytes in one flat piece,
and tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pa_kernels import Lerp, reference

from bench.cases import OPS
from bench.table import record, timed
from bench.weights import Weights

CASE, LAM = OPS["lerp"], 0.3


@pytest.mark.parametrize("dtype", CASE.dtypes)
def test_lerp(benchmark: Any, dtype: str) -> None:
    weights = Weights.drawn(CASE.size, dtype)
    b, i = weights.base, weights.instruct
    live = torch.zeros_like(b)
    out, base, inst = (weights.split(side) for side in (live, b, i))
    lerp = Lerp(out, base, inst)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "one flat torch.lerp(out=)": (3, lambda: torch.lerp(b, i, LAM, out=live)),
        "pa_kernels.Lerp": (3, lambda: lerp.run_(LAM)),
        "pa_kernels.Lerp, again": (3, lambda: lerp.run_(LAM)),
        "torch.lerp(out=) per tensor": (
            3,
            lambda: [torch.lerp(x, y, LAM, out=w) for w, x, y in zip(out, base, inst)],
        ),
        "copy_(torch.lerp()) per tensor": (
            5,
            lambda: [w.copy_(torch.lerp(x, y, LAM)) for w, x, y in zip(out, base, inst)],
        ),
        "_foreach_copy_, _foreach_lerp_": (
            5,
            lambda: (torch._foreach_copy_(out, base), torch._foreach_lerp_(out, inst, LAM)),
        ),
        "copy of one side": (2, lambda: live.copy_(b)),
    }
    lerp.run_(LAM)
    expected, sample = live.clone(), slice(0, 1_000_000)
    assert reference.same_bits(expected[sample], reference.lerp(b[sample], i[sample], LAM)).all(), (
        "wrong bits: no speed"
    )
    wrong = {}
    for name, (_, run) in ways.items():
        live.fill_(9)
        run()
        wrong[name] = 1 - reference.same_bits(live, expected).float().mean().item()
    assert not wrong["pa_kernels.Lerp"], "wrong bits: no speed"
    found = timed(
        {name: run for name, (_, run) in ways.items()},
        CASE.rounds_here,
        {name: sides * b.nbytes for name, (sides, _) in ways.items()},
    )
    flat, ours, again, *others, copy = found
    merging = [replace(way, wrong_share=wrong[way.name]) for way in (flat, ours, again, *others)]
    record(
        benchmark,
        CASE.target,
        f"switch of {weights}",
        [*merging, copy],
        against=flat.name,
        goal=CASE.goal,
        noise=(ours.name, again.name),
        headline=(
            f"{flat.median_s / ours.median_s:.1%} of one flat `torch.lerp(out=)`, {ours.gbps:.1f}"
            " GB/s"
        ),
    )

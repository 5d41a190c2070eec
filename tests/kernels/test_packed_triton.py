"""The packed kernel's body: on a GPU where there is one, else in Triton's interpreter
(`test_interpreter.py` runs it so)."""

from __future__ import annotations

import pytest
import torch
from pa_kernels import Packed, PackedTensor, checksum, reference

from tests.kernels.pairs import INTERPRETED, at_powers_of_two, same, sampled
from tests.kernels.test_packed import hard_lambdas, pair
from tests.kernels.test_triton import fused, fused_multiply_add, on_device  # noqa: F401

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]


@fused
@pytest.mark.parametrize(
    ("dtype", "rel", "span"),
    [
        *sampled([(torch.bfloat16, 0.017, (-0.2, 1.3)), (torch.bfloat16, 0.017, (0.0, 1.0))], 2),
        (torch.bfloat16, 0.23, (0.0, 1.0)),
        (torch.float16, 0.0018, (0.0, 1.0)),
        (torch.float16, 0.03, (0.0, 1.0)),
    ],
    ids=str,
)
def test_a_walk_has_the_bits_of_fresh_merges(
    dtype: torch.dtype, rel: float, span: tuple[float, float]
) -> None:
    # a full tile and a tail, a tail alone, and what starts at an odd place; NaN and infinities are
    # among them
    sources = [pair(size, dtype, rel, seed=size, finite=False) for size in (33_400, 2_600, 2_500)]
    skips = (0, 0, 1)
    live = [on_device(b, skip) for (b, _), skip in zip(sources, skips)]
    entries = [PackedTensor.encode(b, i, span) for b, i in sources]
    packed = Packed(live, [entry.to(live[0].device) for entry in entries])  # type: ignore[union-attr]
    packed.holds(0.0)
    for lam in hard_lambdas(2 if INTERPRETED else 100, seed=5, span=span):
        packed.run_(lam)
        for w, (b, i) in zip(live, sources):
            assert same(w, reference.lerp(b, i, lam)), (lam, w.shape)
        assert packed.wrong() == []
    assert packed.sums() == checksum(live)
    live[1][-1:].view(torch.int16).add_(1)
    packed.run_(0.5)
    assert packed.wrong() == [1]


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_near_the_smallest_normal_number(dtype: torch.dtype) -> None:
    b, i = at_powers_of_two(dtype, 10, range(1, 2))
    b, i = (torch.cat([side, side.new_ones(2 * side.numel())]) for side in (b, i))
    live, entry = on_device(b), PackedTensor.encode(b, i, (-0.2, 1.5))
    assert entry is not None
    packed = Packed([live], [entry.to(live.device)])
    packed.holds(0.0)
    for lam in (-0.2, 1.5, 0.5, -0.2):
        packed.run_(lam)
        assert same(live, reference.lerp(b, i, lam)), lam

"""The packed kernel's body: on a GPU where there is one, else in Triton's interpreter
(`test_interpreter.py` runs it so)."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from pa_kernels import Packed, PackedTensor, checksum, reference
from pa_kernels.packed import triton as packed_triton
from pa_kernels.packed.codes import LAYOUTS
from pa_kernels.reference import LIMIT, MANTISSA, PACKED_TILE, largest
from torch import Tensor

from tests.kernels.pairs import INTERPRETED, at_powers_of_two, bits, same, sampled
from tests.kernels.test_packed import hard_lambdas, neighbours, pair
from tests.kernels.test_triton import fused, fused_multiply_add, on_device  # noqa: F401

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]


@fused
@pytest.mark.parametrize(
    ("dtype", "rel", "span"),
    sampled(
        [
            # 8 bits of either dtype, then 16
            (torch.bfloat16, 0.017, (-0.2, 1.3)),
            (torch.bfloat16, 0.017, (0.0, 1.0)),
            (torch.float16, 0.0018, (0.0, 1.0)),
            (torch.bfloat16, 0.23, (0.0, 1.0)),
            (torch.float16, 0.03, (0.0, 1.0)),
        ],
        2,
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "switches", [1, pytest.param(3, marks=pytest.mark.slow)] if INTERPRETED else [100]
)
def test_a_walk_has_the_bits_of_fresh_merges(
    dtype: torch.dtype, rel: float, span: tuple[float, float], switches: int
) -> None:
    # a full tile and a tail, a tail alone that reaches the second plane, and what starts at an odd
    # place; NaN and infinities are among them
    sizes, skips = (33_000, 2_200, 300), (0, 0, 1)
    sources = [pair(size, dtype, rel, seed=size, finite=False) for size in sizes]
    live = [on_device(b, skip) for (b, _), skip in zip(sources, skips)]
    entries = [PackedTensor.encode(b, i, span) for b, i in sources]
    packed = Packed(live, [entry.to(live[0].device) for entry in entries])  # type: ignore[union-attr]
    packed.holds(0.0)
    # the last two are near the base and near the instruct: a full tile has a loop for each
    for lam in (*hard_lambdas(switches - 1, seed=5, span=span), 1 / 3):
        packed.run_(lam)
        for w, (b, i) in zip(live, sources):
            assert same(w, reference.lerp(b, i, lam)), (lam, w.shape)
        assert packed.wrong() == []
    assert packed.sums() == checksum(live)
    ends_with_a_wrong_bit(packed, live, sources, 1, 0.7)


def ends_with_a_wrong_bit(
    packed: Packed, live: list[Tensor], sources: list[tuple[Tensor, Tensor]], at: int, lam: float
) -> None:
    """A last switch finds what was written between switches, and has the bits of fresh merges
    elsewhere."""
    live[at][-1:].view(torch.int16).add_(1)
    packed.run_(lam)
    assert packed.wrong() == [at]
    for t, (w, (b, i)) in enumerate(zip(live, sources)):
        right = w.numel() - (t == at)
        assert same(w[:right], reference.lerp(b, i, lam)[:right]), (lam, w.shape)


@fused
@pytest.mark.parametrize(
    ("dtype", "rel", "span"),
    sampled(
        [
            (torch.bfloat16, 0.044, (0.0, 1.0)),
            (torch.bfloat16, 0.03, (-0.2, 2.5)),
            (torch.float16, 0.017, (0.0, 1.0)),
        ],
        3,
    ),
    ids=str,
)
def test_a_walk_in_the_layout_speed_has_the_bits_of_fresh_merges(
    dtype: torch.dtype, rel: float, span: tuple[float, float]
) -> None:
    # both layouts in one switch; a full tile and a tail, what starts at an odd place
    sizes, skips = (33_000, 2_200, 300), (0, 1, 0)
    sources = [pair(size, dtype, rel, seed=size, finite=False) for size in sizes]
    live = [on_device(b, skip) for (b, _), skip in zip(sources, skips)]
    entries = [PackedTensor.encode(b, i, span, layout="speed") for b, i in sources]
    entries[2] = PackedTensor.encode(*sources[2], span, width=8)
    packed = Packed(live, [entry.to(live[0].device) for entry in entries])  # type: ignore[union-attr]
    if INTERPRETED:
        assert len(packed.groups) == 2
        assert entries[0].crossing.numel() > 10  # type: ignore[union-attr]
    packed.holds(0.0)
    # λ near either side, before and after, and the ends of the range
    for lam in (0.3, 0.8, span[1]):
        packed.run_(lam)
        for w, (b, i) in zip(live, sources):
            assert same(w, reference.lerp(b, i, lam)), (lam, w.shape)
        assert packed.wrong() == []
    assert packed.sums() == checksum(live)
    ends_with_a_wrong_bit(packed, live, sources, 0, span[0])


# less than a tile, which both layouts switch alike
@fused
@pytest.mark.parametrize(("layout",), sampled([(layout,) for layout in LAYOUTS], 2))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_near_the_smallest_normal_number(dtype: torch.dtype, layout: str) -> None:
    b, i = at_powers_of_two(dtype, 10, range(1, 2))
    b, i = (torch.cat([side, side.new_ones(2 * side.numel())]) for side in (b, i))
    live, entry = on_device(b), PackedTensor.encode(b, i, (-0.2, 1.5), layout=layout)  # type: ignore[arg-type]
    assert entry is not None
    packed = Packed([live], [entry.to(live.device)])
    packed.holds(0.0)
    for lam in (-0.2, 1.5, 0.5, -0.2):
        packed.run_(lam)
        assert same(live, reference.lerp(b, i, lam)), lam


@triton.jit
def solve_kernel(
    w_ptr, code_ptr, out_ptr, lam_ptr, OUT: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr
):
    """The bases of COUNT weights, as the kernel solves for them: it switches to λ = 0."""
    offsets = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    m, code = tl.load(w_ptr + offsets).to(tl.int32), tl.load(code_ptr + offsets).to(tl.int32)
    old, new = tl.load(lam_ptr), tl.load(lam_ptr + 1)
    slope = packed_triton.slopes(old)
    bits = packed_triton.constants_of(tl.zeros((), tl.int64), OUT)
    x = packed_triton.switched(m, code, old, new, slope, bits, OUT, WIDTH)
    tl.store(out_ptr + offsets, packed_triton.round_to(x, OUT).to(tl.int16, bitcast=True))


OFF = [-2, 2, *(pytest.param(by, marks=pytest.mark.slow) for by in (-1, 1))]
"""By how many ulp a quotient may be off; at one, what comes of it lies between what is right and
what comes of two."""


@pytest.fixture(params=OFF if INTERPRETED else (0,), ids="{:+} ulp".format)
def imprecise_division(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Every quotient off by so many ulp, where the interpreter would give the exact one: NVIDIA's
    `div.full` is within 2. Returns a list of what was divided."""
    divided: list[int] = []
    if not INTERPRETED:
        return divided
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def divide(self: Any, x: Any, y: Any) -> Any:
        quotient = np.asarray(x.data / y.data, dtype=np.float32)
        off = np.where(np.isfinite(quotient) & (quotient != 0), request.param, 0).astype(np.int32)
        divided.append(quotient.size)
        return TensorHandle((quotient.view(np.int32) + off).view(np.float32), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)
    return divided


ADVERSARIAL = [
    reference.fp32(lam)
    for lam in (
        0.0,
        1.0,
        1e-45,  # the least fp32
        2**-126,
        1e-30,
        2**-24,
        1 - 2**-24,
        1 - 2**-23,
        0.5,
        0.5 - 2**-25,
        0.5 + 2**-24,
        1 / 3,
        2 / 3,
        # merges of bf16 on ties of its own grid, and just beside them
        *(near for n in (1, 2, 3, 5, 7, 9, 31, 62, 63) for near in (0.5 / n, 1 - 0.5 / n)),
        *(k / 256 for k in (1, 85, 127, 128, 129, 171, 255)),
        *(math.nextafter(k / 126, side) for k in (1, 61, 63, 125) for side in (0, 1)),
    )
]
"""λ where fp32 loses most, where the contract's branches meet, and where merges tie."""

PARTS = 8 if INTERPRETED else 4
"""That these λ are shared among: the first is quick."""


def all_pairs(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """Bases and codes: for 8 bits every position of a binade with every k, at the least, a middle
    and the largest exponent; for 16 bits random ones, at all exponents."""
    if width == 8:
        b, i = (bits(side).int() for side in neighbours(dtype, LIMIT[8]))
        h, top = MANTISSA[dtype], largest(dtype)
        binade = b[0] >> h
        exponents = (1, 2, int(binade), (top >> h) - 1, top >> h)
        moved = [(e - binade) << h for e in exponents]
        b, i = (torch.cat([side + by for by in moved]) for side in (b, i))
    else:
        g = torch.Generator().manual_seed(17)
        b = torch.randint(1 << MANTISSA[dtype], largest(dtype) + 1, (1 << 17,), generator=g)
        k = torch.randint(-LIMIT[16], LIMIT[16] + 1, b.shape, generator=g)
        b, i = b, b + torch.where(torch.rand(b.shape, generator=g) < 0.5, k, k >> 5)
    normal = (i >= 1 << MANTISSA[dtype]) & (i <= largest(dtype))
    b, i = b[normal], i[normal]
    return b.to(torch.int16).view(dtype), (2 * (i - b) + (b & 1)).to(torch.int16)


@fused
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, PARTS))]
)
@pytest.mark.parametrize("width", LIMIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_is_found_where_every_division_is_off_by_two_ulp(
    dtype: torch.dtype, width: int, part: int, imprecise_division: list[int]
) -> None:
    b, codes = all_pairs(dtype, width)
    if dtype == torch.float16:
        b, codes = b[part % 5 :: 5], codes[part % 5 :: 5]
    i = (bits(b) + (codes >> 1)).view(dtype)
    count = triton.next_power_of_2(b.numel())
    block = count if INTERPRETED else 1024
    held, found, code = (on_device(torch.zeros(count, dtype=torch.int16)) for _ in range(3))
    code[: b.numel()] = on_device(codes)
    for lam in ADVERSARIAL[part::PARTS]:
        held[: b.numel()] = on_device(bits(reference.lerp(b, i, lam)))
        table = on_device(torch.tensor([lam, 0.0]))
        constants = {"OUT": packed_triton.TRITON_DTYPES[dtype], "WIDTH": width, "COUNT": block}
        solve_kernel[(count // block,)](held, code, found, table, **constants)
        wrong = found[: b.numel()].cpu() != bits(b)
        assert not bool(wrong.any()), (lam, b[wrong][:3].tolist(), i[wrong][:3].tolist())
    assert imprecise_division or not INTERPRETED


@triton.jit
def step_kernel(code_ptr, out_ptr, lam_ptr, OUT: tl.constexpr, COUNT: tl.constexpr):
    """bits(W(new)) − bits(W(old)) of every code, as a stream of them is stepped."""
    offsets = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    code = tl.load(code_ptr + offsets).to(tl.int32)
    bits = packed_triton.constants_of(tl.zeros((), tl.int64), OUT)
    old_near, old_weight = packed_triton.half_weight(tl.load(lam_ptr))
    new_near, new_weight = packed_triton.half_weight(tl.load(lam_ptr + 1))
    weights = old_weight, new_weight
    if old_near:
        if new_near:
            step = packed_triton.stepped_weight(code, 0, weights, bits, True, True, OUT)
        else:
            step = packed_triton.stepped_weight(code, 0, weights, bits, True, False, OUT)
    else:
        if new_near:
            step = packed_triton.stepped_weight(code, 0, weights, bits, False, True, OUT)
        else:
            step = packed_triton.stepped_weight(code, 0, weights, bits, False, False, OUT)
    tl.store(out_ptr + offsets, step.to(tl.int16))


@fused
@pytest.mark.parametrize(
    ("span",), sampled([((0.0, 1.0),), ((-0.2, 1.5),), ((-1.0, 3.0),)], 2), ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("every",), sampled([(3,), (1,)], 2) if INTERPRETED else [(1,)])
def test_steps_of_every_pair_within_a_binade(
    dtype: torch.dtype, span: tuple[float, float], every: int
) -> None:
    b, i = neighbours(dtype, LIMIT[8])
    if dtype == torch.float16:
        b, i = b[::7], i[::7]
    entry = PackedTensor.encode(
        *(torch.cat([side, b.new_ones(3 * b.numel())]) for side in (b, i)), span, layout="speed"
    )
    assert entry is not None and entry.crossing is not None
    held = torch.ones(entry.numel, dtype=torch.bool)
    for starts, where in ((entry.starts, entry.where), (entry.crossing_starts, entry.crossing)):
        tiles = torch.repeat_interleave(starts.diff().long())  # type: ignore[union-attr]
        held[tiles * PACKED_TILE + where.long()] = False
    held = held[: b.numel()]
    b, i = b[held], i[held]
    assert b.numel() > 1000
    codes = on_device(entry.element_codes(slice(0, held.numel()))[held])
    count = triton.next_power_of_2(codes.numel())
    block = count if INTERPRETED else 1024
    code, step = (on_device(torch.zeros(count, dtype=torch.int16)) for _ in range(2))
    code[: codes.numel()] = codes
    lams = [lam for lam in (*ADVERSARIAL, *hard_lambdas(20, 5, span)) if span[0] <= lam <= span[1]]
    lams = [*lams[::every], *(reference.fp32(lam) for lam in span)]
    held_bits = bits(b)
    old = 0.0
    for lam in lams:
        constants = {"OUT": packed_triton.TRITON_DTYPES[dtype], "COUNT": block}
        step_kernel[(count // block,)](code, step, on_device(torch.tensor([old, lam])), **constants)
        held_bits = held_bits + step[: codes.numel()].cpu()
        wrong = held_bits != bits(reference.lerp(b, i, lam))
        assert not bool(wrong.any()), (old, lam, b[wrong][:3].tolist(), i[wrong][:3].tolist())
        old = lam

"""Stochastic rounding: the formulas against exact arithmetic, the CPU path against the reference,
and what it is for."""

from __future__ import annotations

import math
import zlib
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import Lerp, lerp_, noise, reference
from pa_kernels.reference import DRAW_STEP, Draw

from tests.kernels.pairs import LAMBDAS, TRIPLES, bits, pair, same

NARROW = (torch.bfloat16, torch.float16)
KEY = zlib.crc32(b"model.norm.weight") ^ 7


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize(
    "start", [0, 5 * DRAW_STEP, 2**31 - DRAW_STEP, 2**32 - DRAW_STEP, 2**40 - DRAW_STEP]
)
def test_noise_is_the_formula_at_any_index(start: int) -> None:
    count = 3 * DRAW_STEP
    found = reference.noise(Draw(KEY, start), count)
    for k in (0, 1, 77, DRAW_STEP - 1, DRAW_STEP, count - 1):
        index = start + k
        assert int(found[k]) == lowbias32(index % 2**32 ^ lowbias32(index >> 32 ^ KEY)) & 0xFFFF
    for first, length in ((0, count), (DRAW_STEP, 99)):
        u = torch.empty(length, dtype=torch.int32)
        noise.noise_(u, Draw(KEY, start + first), torch.empty_like(u))
        assert torch.equal(u.long(), found[first : first + length])


def test_noise_is_uniform_and_of_its_tensor() -> None:
    u = reference.noise(Draw(KEY), 2**20)
    assert float(u.double().mean()) == pytest.approx(2**15, rel=0.003)
    assert int(torch.bincount(u >> 8, minlength=256).sub(4096).abs().max()) < 5 * 64
    for other in (Draw(KEY ^ 1), Draw(KEY, DRAW_STEP)):
        assert float((reference.noise(other, 2**20) == u).double().mean()) < 1e-4


@pytest.mark.parametrize(
    ("key", "start"), [(-1, 0), (2**32, 0), (0, 1), (0, -DRAW_STEP), (0, 2**48)]
)
def test_a_draw_that_is_none(key: int, start: int) -> None:
    with pytest.raises(ValueError, match="expected a key"):
        Draw(key, start)


def exactly(x: float, u: int, dtype: torch.dtype) -> float:
    """Stochastic rounding by its definition: the magnitude in ulps of `dtype`, plus u, cut off. A
    ulp is 2¹⁶ steps of u, and no more of the magnitude than these steps counts."""
    smallest, digits = (-133, 8) if dtype == torch.bfloat16 else (-24, 11)
    size = abs(Fraction(x))
    exponent = max(math.frexp(abs(x))[1] - digits, smallest)
    steps = size / Fraction(2) ** exponent * 2**16
    # fp16's normal numbers have 13 bits below their own, so 3 of those of u are cut off
    coarse = 2**3 if dtype == torch.float16 and abs(x) >= 2**-14 else 1
    whole = (int(steps // coarse) + u // coarse) * coarse // 2**16
    return math.copysign(float(whole * Fraction(2) ** exponent), x)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@settings(max_examples=400)
@given(
    st.one_of(
        st.floats(width=32), st.floats(-(2**-13), 2**-13, width=32), st.floats(-2, 2, width=32)
    ),
    st.integers(0, 2**16 - 1),
)
def test_rounding_is_its_definition(dtype: torch.dtype, x: float, u: int) -> None:
    wide = torch.tensor([x])
    found = reference.stochastic(wide, torch.tensor([u]), dtype)
    if not abs(x) < torch.finfo(dtype).max:
        assert same(found, wide.to(dtype))
    else:
        assert same(found, torch.tensor([exactly(x, u, dtype)]).to(dtype)), (x, u, float(found))
        assert abs(float(found)) <= torch.finfo(dtype).max
    fast = torch.empty(1, dtype=dtype)
    with mock.patch.object(noise, "noise_", lambda out, draw, shifted: out.fill_(u)):
        noise.stochastic_(fast, wide.clone(), Draw(0))
    assert same(fast, found)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_the_dtype_represents_keeps_its_bits_and_the_largest_stays_finite(
    dtype: torch.dtype,
) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for u in (0, 1, 0x7FFF, 0xFFFF):
        assert torch.equal(
            bits(reference.stochastic(every.float(), torch.full(every.shape, u), dtype)),
            bits(every),
        )
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float32)
    below = torch.nextafter(largest, torch.zeros(()))
    for x in (largest, below, -below, torch.nextafter(largest, 2 * largest)):
        assert bool(reference.stochastic(x.view(1), torch.tensor([0xFFFF]), dtype).isfinite())


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES, ids=str)
@pytest.mark.parametrize("finite", [True, False])
def test_the_cpu_path_is_the_reference(
    out: torch.dtype, base: torch.dtype, inst: torch.dtype, finite: bool
) -> None:
    # the noise crosses an index of 2³²
    b, i = pair(67_003, base, inst, finite=finite)
    draw = Draw(KEY, 2**32 - DRAW_STEP)
    live, again = torch.empty_like(b, dtype=out), torch.empty_like(b, dtype=out)
    prepared = Lerp([live], [b], [i], draws=[draw])
    for lam in LAMBDAS if out == base == inst else (0.0, 0.3, 1.0):
        expected = reference.lerp(b, i, lam, out, draw=draw)
        prepared.run_(lam)
        lerp_([again], [b], [i], lam, draws=[draw])
        assert same(live, expected) and same(again, expected), lam
        if out == base == inst:
            kept = (bits(b) == bits(i)) | (lam in (0.0, 1.0))
            assert torch.equal(bits(live)[kept], bits(expected)[kept]), lam


def test_the_first_rounding_draws() -> None:
    b, i = pair(5000, torch.float32, torch.float32)
    w = torch.empty(5000)
    lerp_([w], [b], [i], 0.3, intermediate_dtypes=[torch.bfloat16], draws=[Draw(KEY)])
    assert torch.equal(w, reference.lerp(b, i, 0.3, torch.bfloat16, draw=Draw(KEY)).float())
    assert same(w, reference.lerp(b, i, 0.3, torch.float32, torch.bfloat16, Draw(KEY)))
    lerp_([w], [b], [i], 0.3, draws=[Draw(KEY)])
    assert torch.equal(w, reference.lerp(b, i, 0.3)), "fp32 goes to nearest"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_order_and_cutting_change_no_bit(dtype: torch.dtype) -> None:
    b, i = pair(300_001, dtype, dtype)
    w, cut = torch.empty_like(b), torch.empty_like(b)
    prepared = Lerp([w, b.clone()], [b, b], [i, i], draws=[Draw(KEY), None])
    for lam in (0.9, 0.05, 0.3):
        prepared.run_(lam)
    for start in range(0, b.numel(), DRAW_STEP):
        part = slice(start, start + DRAW_STEP)
        lerp_([cut[part]], [b[part]], [i[part]], 0.3, draws=[Draw(KEY, start)])
    assert torch.equal(bits(w), bits(cut))
    assert not torch.equal(bits(w), bits(reference.lerp(b, i, 0.3)))
    lerp_([cut], [b], [i], 0.3, draws=[Draw(KEY ^ 1)])
    assert not torch.equal(bits(w), bits(cut))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("source", [None, torch.float32], ids=str)
def test_every_element_is_monotone_in_lambda(
    dtype: torch.dtype, source: torch.dtype | None
) -> None:
    b, i = pair(20_000, source or dtype, source or dtype)
    w, before = torch.empty(20_000, dtype=dtype), reference.lerp(b, i, -0.5, dtype, draw=Draw(KEY))
    rises, falls = i.float() >= b.float(), i.float() <= b.float()
    prepared = Lerp([w], [b], [i], draws=[Draw(KEY)])
    for step in range(-50, 150):
        prepared.run_(step / 100)
        assert bool((w >= before)[rises].all()) and bool((w <= before)[falls].all()), step
        before = w.clone()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_average_follows_lambda_where_nearest_does_not(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    b = torch.randn(2_000_000, generator=g).mul(0.02)
    i = (b + 0.02 * 0.02 * torch.randn(b.shape, generator=g)).to(dtype)
    b = b.to(dtype)

    def effective(lam: float, draw: Draw | None) -> float:
        w = torch.empty_like(b)
        lerp_([w], [b], [i], lam, draws=[draw])
        delta = i.double() - b.double()
        return float((w.double() - b.double()).dot(delta) / delta.dot(delta))

    for lam in (0.05, 0.1, 0.9):
        assert abs(effective(lam, Draw(KEY)) - lam) <= 0.002, lam
    if dtype == torch.bfloat16:
        assert effective(0.05, None) == pytest.approx(0.026, abs=0.002)


def test_a_draw_for_each_tensor() -> None:
    b, i = pair(10, torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match="2 draws"):
        lerp_([b.clone()], [b], [i], 0.5, draws=[None, None])

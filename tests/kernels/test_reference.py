"""The specification itself: against exact rational arithmetic, against torch.lerp, and against what
it promises at its edges."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import reference
from torch import Tensor

LAMBDAS = (-2.3, -0.2, 0.05, 0.3, 1 / 3, math.nextafter(0.5, 0), 0.5, 0.6, 0.9, 0.999, 1.5, 3.7)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(reference.BITS[tensor.dtype])


def nearest_fp32(exact: Fraction) -> float:
    """The fp32 nearest to an exact number, ties to even, from its definition; zero comes out as
    +0."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = max(math.frexp(float(size))[1] - 24 if size > Fraction(2) ** -200 else -149, -149)
    while size / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and size / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    value = round(size / Fraction(2) ** exponent) * Fraction(2) ** exponent
    value = math.inf if value >= Fraction(2) ** 128 else float(value)
    return value if exact > 0 else -value


def fp32_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


@settings(max_examples=400)
@given(floats, floats, floats)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    found = reference.fma(torch.tensor(a), torch.tensor(b), torch.tensor(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        assert found == 0
    else:
        assert int(bits(found)) == fp32_bits(nearest_fp32(exact))


@settings(max_examples=300)
@given(
    st.integers(-200, 200),
    st.integers(0, 2**23 - 1),
    st.integers(0, 2**23 - 1),
    st.integers(-3, 3),
    st.booleans(),
)
def test_fma_next_to_a_tie(shift: int, low: int, high: int, nudge: int, negative: bool) -> None:
    # an addend within a few units of half an ulp away from the product, where a second rounding
    # would show
    a, b = 1 + high * 2.0**-23, 1 + low * 2.0**-23
    scale = 2.0 ** max(min(shift, 60), -60)
    c = (
        torch.tensor(-a * b + (1 + nudge * 2.0**-23) * 2.0**-25 * (-1 if negative else 1)).item()
        * scale
    )
    exact = Fraction(a * scale) * Fraction(b) + Fraction(c)
    found = reference.fma(torch.tensor(a * scale), torch.tensor(b), torch.tensor(c))
    assert found.item() == nearest_fp32(exact)


def test_fp64_alone_would_round_twice() -> None:
    b, i = torch.tensor(1.0), torch.tensor(1.3612505197525024)
    lam = torch.tensor(0.005587236490100622)
    twice = (lam.double() * (i - b).double() + b.double()).float()
    once = reference.fma(lam, i - b, b)
    exact = Fraction(lam.item()) * Fraction((i - b).item()) + Fraction(b.item())
    assert once.item() == nearest_fp32(exact)
    assert twice.item() != once.item()
    assert torch.lerp(b, i, lam.item()).item() == once.item()


def test_fma_of_infinities_and_nan() -> None:
    inf, nan, one = torch.tensor(math.inf), torch.tensor(math.nan), torch.tensor(1.0)
    assert reference.fma(inf, one, one).item() == math.inf
    assert reference.fma(inf, one, -inf).isnan()
    assert reference.fma(nan, one, one).isnan()
    assert reference.fma(torch.tensor(3e38), torch.tensor(3e38), -one).item() == math.inf
    assert fp32_bits(
        reference.fma(-one, torch.tensor(0.0), torch.tensor(-0.0)).item()
    ) == fp32_bits(-0.0)


def test_fma_takes_fp32_only() -> None:
    with pytest.raises(TypeError, match="float64"):
        reference.fma(torch.ones(1), torch.ones(1).double(), torch.ones(1))


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-6, 1e-38, 1e-41])
def test_equals_torch_lerp(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    b = (torch.randn(20_011, generator=generator) * scale).to(dtype)
    i = (b.float() * (1 + 0.1 * torch.randn(20_011, generator=generator))).to(dtype)
    negative_zero = (b == 0) & (i == 0) & b.signbit() & i.signbit()
    for lam in LAMBDAS:
        found, expected = reference.lerp(b, i, lam), torch.lerp(b, i, lam)
        assert torch.equal(bits(found)[~negative_zero], bits(expected)[~negative_zero]), lam
        assert bool((found[negative_zero].signbit()).all())


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
@pytest.mark.parametrize("lam", [*LAMBDAS, 0.0, 1.0])
def test_equal_bits_survive(dtype: torch.dtype, lam: float) -> None:
    nan_payload = {torch.float32: 0x7FA01234, torch.float16: 0x7D12, torch.bfloat16: 0x7FA3}[dtype]
    b = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 6e-8, -1e-40], dtype=dtype)
    bits(b)[5] = nan_payload
    assert torch.equal(bits(reference.lerp(b, b.clone(), lam)), bits(b))


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_endpoints_are_the_sources_bits(dtype: torch.dtype) -> None:
    b = torch.tensor([-0.0, math.nan, math.inf, 3e38, 1e-30, -0.0], dtype=dtype)
    i = torch.tensor([1.0, 2.0, -math.inf, -3e38, 1.0, 0.0], dtype=dtype)
    bits(b)[1] |= 3
    assert torch.equal(bits(reference.lerp(b, i, 0)), bits(b))
    assert torch.equal(bits(reference.lerp(b, i, -0.0)), bits(b))
    assert torch.equal(bits(reference.lerp(i, b, 1)), bits(b))
    assert torch.equal(bits(reference.lerp(b.float(), b, 1)), bits(b))


def test_endpoint_of_a_wider_source_is_rounded() -> None:
    b, i = torch.tensor([1 + 2.0**-9 + 2.0**-20, -0.0]), torch.tensor([2.0, 1.0]).bfloat16()
    assert torch.equal(bits(reference.lerp(b, i, 0)), bits(b.bfloat16()))


def test_an_intermediate_dtype_is_a_rounding_in_between() -> None:
    b, i = torch.randn(1000), torch.randn(1000).bfloat16()
    held = reference.lerp(b, i, 0.3, torch.float32, torch.bfloat16)
    assert held.dtype == torch.float32
    assert torch.equal(held, reference.lerp(b, i, 0.3).float())
    assert not torch.equal(held, reference.lerp(b, i, 0.3, torch.float32))
    assert torch.equal(
        reference.lerp(b, i, 0.3, torch.bfloat16, torch.float32), reference.lerp(b, i, 0.3)
    )


def test_lambda_is_rounded_once_and_must_be_finite() -> None:
    b, i = torch.randn(1000), torch.randn(1000)
    assert torch.equal(reference.lerp(b, i, 1 / 3), reference.lerp(b, i, reference.fp32(1 / 3)))
    for lam in (math.nan, math.inf, 1e39):
        with pytest.raises(ValueError, match="finite"):
            reference.lerp(b, i, lam)


def test_odd_factors_are_odd_and_all_different_within_a_chunk() -> None:
    j = torch.arange(2 * reference.CHUNK_WORDS)
    factors = reference.odd(j)
    assert bool((factors & 1).all())
    assert factors.unique().numel() == factors.numel()


def test_checksum_from_its_definition() -> None:
    data = bytes(range(256)) * 300 + b"abc"
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    words = [
        int.from_bytes(data[at : at + 8].ljust(8, b"\0"), "little", signed=True)
        for at in range(0, len(data), 8)
    ]
    factors = [int(f) for f in reference.odd(torch.arange(len(words)))]
    for version, fold in reference.FOLD.items():
        terms = [(w + fold * (w >> 32)) * f for w, f in zip(words, factors, strict=True)]
        assert reference.checksum(tensor, version) == sum(terms) % 2**64


def test_checksum_of_known_bytes_never_changes() -> None:
    # a format constant: sums are kept in journals and merged checkpoints
    assert reference.checksum(torch.tensor([], dtype=torch.bfloat16)) == 0
    known = torch.arange(100_000, dtype=torch.int32)
    assert reference.checksum(known, version=1) == 0x2030E0D489519B80
    assert reference.checksum(known) == 0xF68A33A9E8566BF2

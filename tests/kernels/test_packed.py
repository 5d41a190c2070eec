"""Packed deltas: the reference's uniqueness, the CPU path against the reference, and what is
refused."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pa_kernels import Packed, PackedTensor, checksum, packed_switch_, reference
from pa_kernels.packed import of_lower_parity, packed_bytes, packed_pair, packed_target
from pa_kernels.packed.codes import span_of
from pa_kernels.reference import LIMIT, MANTISSA, PACKED_TILE
from torch import Tensor

from tests.kernels.pairs import at_powers_of_two, bits, fresh, same

DTYPES = [torch.bfloat16, torch.float16]
RELATIVE = (0.0018, 0.017, 0.044, 0.14, 0.23)
SPANS = [(0.0, 1.0), (-0.2, 1.3)]
WIDE = [(0.0, 1.0), (-0.2, 1.5), (-1.0, 3.0)]
WEIGHTS = int(os.environ.get("PA_FAST_TEST_WEIGHTS", str(1 << 18)))
"""Random weights of each dtype; 100,000,000 take an hour."""
WALK = int(os.environ.get("PA_FAST_TEST_WALK", "24"))
"""Switches of a long walk; 1,000 take minutes."""


def pair(
    size: int, dtype: torch.dtype, rel: float, seed: int = 0, finite: bool = True
) -> tuple[Tensor, Tensor]:
    """Gaussian weights and a relative step, with zeros, subnormals, and unless `finite` NaN and
    infinities among them."""
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(size, generator=g) * 0.02
    i = (b + torch.randn(size, generator=g) * 0.02 * rel).to(dtype)
    b = b.to(dtype)
    special = [
        (-0.0, 0.0),
        (-0.0, -0.0),
        (0.0, 0.5),
        (1e-7, 2e-7),
        (1e-39, 1e-39),
        (-1e-39, 3e-39),
        (0.25, -0.25),
    ]
    if not finite:
        special += [(math.nan, math.nan), (math.inf, math.inf), (1.0, math.nan), (-math.inf, 2.0)]
    for at, (x, y) in enumerate(special[: size // 2]):
        b[at * 2], i[at * 2] = x, y
    return b, i


def hard_lambdas(count: int, seed: int = 0, span: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """λ in the span, some of them where results tie or round away, each an fp32."""
    draw = random.Random(seed)
    chosen = [
        0.0,
        1.0,
        0.5,
        0.25,
        1 / 3,
        2**-24,
        1 - 2**-24,
        math.nextafter(0.5, 0),
        1e-30,
        *(k / 256 for k in (1, 85, 171, 255)),
    ]
    while len(chosen) < count:
        chosen.append(
            draw.choice(
                [draw.uniform(*span), draw.randrange(1, 512) / 512, draw.uniform(*span) * 1e-3]
            )
        )
    draw.shuffle(chosen)
    return [reference.fp32(lam) for lam in chosen[:count]]


def quick_or_slow(spans: Sequence[tuple[float, float]], quick: int) -> list[Any]:
    """Parameters, slow ones but for the first `quick`."""
    return [
        pytest.param(span, marks=[pytest.mark.slow] if k >= quick else [])
        for k, span in enumerate(spans)
    ]


def neighbours(dtype: torch.dtype, largest: int) -> tuple[Tensor, Tensor]:
    """Patterns of every position in a binade, with every |k| ≤ largest: all that scaling by powers
    of two leaves apart."""
    h = MANTISSA[dtype]
    one = int(bits(torch.ones(1, dtype=dtype))[0])
    b = torch.arange(one, one + (1 << h)).repeat_interleave(2 * largest + 1)
    k = torch.arange(-largest, largest + 1).repeat(1 << h)
    return b.to(torch.int16).view(dtype), (b + k).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_two_pairs_of_one_code_meet(dtype: torch.dtype) -> None:
    # f grows with the lower pattern, so it is enough that neighbours of one parity differ
    b, i = neighbours(dtype, 63 if dtype == torch.bfloat16 else 15)
    for lam in hard_lambdas(40):
        here = bits(reference.lerp(b, i, lam))
        beyond = bits(reference.lerp((bits(b) + 2).view(dtype), (bits(i) + 2).view(dtype), lam))
        assert bool((here < beyond).all()), lam


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", LIMIT)
def test_the_reference_finds_both_sources(dtype: torch.dtype, width: int) -> None:
    for rel, span in itertools.product((0.017, 0.23), SPANS):
        b, i = pair(10_000, dtype, rel)
        codes, odd = reference.packed_codes(b, i, width, span)
        b, i, codes = b[~odd], i[~odd], codes[~odd]
        for lam in hard_lambdas(6, span=span):
            found = reference.packed_sources(reference.lerp(b, i, lam), codes, lam)
            assert torch.equal(bits(found[0]), bits(b)) and torch.equal(bits(found[1]), bits(i)), (
                rel,
                span,
                lam,
            )
        live = reference.lerp(b, i, 0.3)
        assert torch.equal(
            bits(reference.packed_switch(live, codes, 0.3, 0.8)),
            bits(reference.lerp(b, i, 0.8)),
        )


def test_without_the_parity_bit_sources_are_not_told_apart() -> None:
    # λ = ½, k = 1: W ties to even, so that an odd base and the even one above it meet
    b = torch.tensor([1 + 2**-7, 1 + 2 * 2**-7]).bfloat16()
    i = (bits(b) + 1).view(torch.bfloat16)
    assert bits(reference.lerp(b, i, 0.5)).unique().numel() == 1
    assert reference.packed_codes(b, i, 8)[0].tolist() == [3, 2]


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_exceptions_are_the_references(dtype: torch.dtype, finite: bool) -> None:
    for rel, span, size in itertools.product(RELATIVE, SPANS, (1, 4095, 70_001)):
        b, i = pair(size, dtype, rel, finite=finite)
        entry = PackedTensor.encode(b, i, span)
        if entry is None:
            continue
        entry.check()
        codes, odd = reference.packed_codes(b, i, entry.width, span)
        assert torch.equal(entry.element_codes(slice(0, size)), codes)
        positions, base, target = entry.exceptions(slice(0, size))
        assert torch.equal(positions, odd.nonzero().view(-1))
        assert torch.equal(bits(base), bits(b[odd])) and torch.equal(bits(target), bits(i[odd]))
        assert entry.nbytes == packed_bytes(size, entry.count, entry.width)


@pytest.mark.parametrize(
    ("rel", "most"), [(0.0018, 3.06), (0.017, 3.2), (0.044, 3.52), (0.14, 4.3), (0.23, 4.5)]
)
def test_bytes_per_weight(rel: float, most: float) -> None:
    entry = PackedTensor.encode(*pair(1 << 20, torch.bfloat16, rel))
    assert entry is not None and 2 + entry.nbytes / entry.numel < most


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("width", LIMIT)
def test_codes_do_not_depend_on_how_encoding_is_cut(
    width: int, span: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a GPU's pieces are larger than a test's tensors: so the CPU takes as few and as many of them
    b, i = pair(9 * PACKED_TILE + 77, torch.bfloat16, 0.044, finite=False)
    entries = []
    for elements in (1 << 24, PACKED_TILE, 4 * PACKED_TILE):
        monkeypatch.setattr("pa_kernels.packed.codes.CPU_SPAN", elements)
        monkeypatch.setattr("pa_kernels.parts.CPU_SPAN", elements >> 4)
        entry = PackedTensor.encode(b, i, span, width=width)
        assert entry is not None and entry.misfit(b) is None
        entry.check()
        entries.append(entry)
    for entry in entries[1:]:
        for name, part in entries[0].parts.items():
            assert torch.equal(entry.parts[name].view(torch.uint8), part.view(torch.uint8))


def test_the_pieces_of_an_encoding_are_whole_tiles_and_larger_on_a_gpu() -> None:
    here, there = (torch.empty(0, device=device) for device in ("cpu", "meta"))
    assert (span_of(here), span_of(there)) == (1 << 18, 1 << 24)
    assert span_of(here) % PACKED_TILE == span_of(there) % PACKED_TILE == 0


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_speed_lists_what_has_no_step_and_is_the_same_otherwise(
    dtype: torch.dtype, span: tuple[float, float]
) -> None:
    b, i = pair(3 * PACKED_TILE + 77, dtype, 0.044 if dtype == torch.bfloat16 else 0.01)
    b[:4000], i[:4000] = b[0], b[0]  # so that exceptions of a wide range do not outnumber
    entry, other = (
        PackedTensor.encode(b, i, span, width=8, layout=layout) for layout in ("speed", "size")
    )
    assert entry is not None and other is not None
    assert (entry.layout, other.layout) == ("speed", "size")
    assert all(torch.equal(entry.parts[name], part) for name, part in other.parts.items())
    entry.check()
    assert entry.crossing is not None and entry.crossing_starts is not None
    assert entry.nbytes == packed_bytes(b.numel(), entry.count, 8, entry.crossing.numel())
    codes, odd = reference.packed_codes(b, i, 8, span)
    crosses = (bits(b) ^ bits(i)) >> MANTISSA[dtype] != 0
    if span != (0.0, 1.0):
        for lam in span:
            crosses |= (bits(reference.lerp(b, i, lam)).int() - bits(b).int()).abs() > LIMIT[8]
    crosses &= ~odd & (codes >> 1 != 0)
    tile = torch.arange(4).repeat_interleave(entry.crossing_starts.diff())
    found = tile * PACKED_TILE + entry.crossing.long()
    assert torch.equal(found, crosses.nonzero().view(-1))
    assert found.numel() > 0 or span != (0.0, 1.0)
    assert entry.misfit(b) is None
    if found.numel():
        missing = entry.crossing.int()
        at = int(found[0])
        missing[0] = at - 1 if at and not crosses[at - 1] else at + 1
        wrong = replace(entry, crossing=missing.to(torch.uint16)).misfit(b)
        assert wrong == min(at, int(missing[0]))


def test_the_layout_speed_has_codes_of_8_bits() -> None:
    b, i = pair(5000, torch.bfloat16, 0.02)
    for options in ({"layout": "speed", "width": 16}, {"layout": "fast"}):
        with pytest.raises(ValueError, match="expected size, or of 8 bits speed"):
            PackedTensor.encode(b, i, **options)  # type: ignore[arg-type]
    entry = PackedTensor.encode(b, i, layout="speed")
    assert entry is not None and entry.width == 8


@pytest.mark.parametrize(("rel", "most"), [(0.0018, 3.06), (0.017, 3.3), (0.044, 3.7)])
def test_bytes_per_weight_in_the_layout_speed(rel: float, most: float) -> None:
    entry = PackedTensor.encode(*pair(1 << 20, torch.bfloat16, rel), layout="speed")
    assert entry is not None and 2 + entry.nbytes / entry.numel < most


def test_the_width_is_the_one_that_takes_fewer_bytes() -> None:
    widths = [PackedTensor.encode(*pair(1 << 17, torch.bfloat16, rel)).width for rel in RELATIVE]  # type: ignore[union-attr]
    assert widths == [8, 8, 8, 16, 16]
    g = torch.Generator().manual_seed(1)
    strangers = [torch.randn(1 << 14, generator=g).bfloat16() for _ in range(2)]
    assert PackedTensor.encode(*strangers) is None


def walk(b: Tensor, i: Tensor, lams: list[float], span: tuple[float, float] = (0.0, 1.0)) -> None:
    entry = PackedTensor.encode(b, i, span)
    assert entry is not None
    live = b.clone()
    packed = Packed([live], [entry])
    packed.holds(0.0)
    for lam in lams:
        packed.run_(lam)
        assert same(live, reference.lerp(b, i, lam)), lam
        assert packed.wrong() == []
    assert packed.sums() == checksum([live])


@pytest.fixture(params=["by tables", "one by one"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pa_kernels.packed.cpu.FEW", -1 if request.param == "by tables" else 1 << 40
    )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("rel", [pytest.param(0.0018, marks=pytest.mark.slow), 0.044, 0.23])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_walk_of_switches_has_the_bits_of_fresh_merges(
    dtype: torch.dtype, rel: float, span: tuple[float, float]
) -> None:
    sources = pair(40_003, dtype, rel, finite=False)
    if PackedTensor.encode(*sources, span) is not None:
        walk(*sources, hard_lambdas(8, seed=3, span=span), span)


@pytest.mark.slow
def test_a_thousand_switches_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    # PA_FAST_TEST_WALK says how many
    for dtype in DTYPES:
        for few in (-1, 1 << 40):
            monkeypatch.setattr("pa_kernels.packed.cpu.FEW", few)
            test_a_long_walk_over_every_pair_of_a_binade_and_its_neighbours(dtype)
            test_a_walk_over_all_exponents(dtype)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_walk_over_every_pair_of_a_binade_and_its_neighbours(dtype: torch.dtype) -> None:
    b, i = neighbours(dtype, 63)
    entry = PackedTensor.encode(b, i)
    assert entry is not None and entry.width == 8 and entry.count == 0
    live = b.clone()
    packed = Packed([live], [entry])
    packed.holds(0.0)
    for lam in hard_lambdas(WALK, seed=7):
        packed.run_(lam)
        assert torch.equal(bits(live), bits(reference.lerp(b, i, lam))), lam
    assert packed.wrong() == []


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_walk_over_all_exponents(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(11)
    b = torch.randint(-32768, 32768, (100_000,), generator=g)
    k = (8191 * torch.rand(b.shape, generator=g) ** 4).int() * (
        1 - 2 * torch.randint(0, 2, b.shape, generator=g)
    )
    sources = [side.to(torch.int16).view(dtype) for side in (b, (b + k).clamp(-32768, 32767))]
    walk(*sources, hard_lambdas(WALK if WALK > 100 else 6, seed=12))


def around(span: tuple[float, float]) -> list[float]:
    """λ at both ends of a range, next to them, at 0, 1 and between: from each end to the other one
    too."""
    lo, hi = (reference.fp32(lam) for lam in span)
    inner = (lo + (hi - lo) * share for share in (0.001, 0.07, 0.5, 0.93, 0.999))
    return [
        reference.fp32(lam)
        for lam in (
            hi,
            lo,
            *inner,
            lo + (hi - lo) * 2**-23,
            hi - (hi - lo) * 2**-23,
            1.0,
            hi,
            0.0,
            lo,
        )
    ]


def assert_every_switch_is_right(
    b: Tensor,
    i: Tensor,
    width: int,
    span: tuple[float, float],
    few: tuple[int, ...] = (-1, 1 << 40),
) -> None:
    """Codes and exceptions are the reference's, and switches by tables and one by one have the bits
    of fresh merges."""
    # equal weights: exceptions may outnumber the codes of these pairs
    padding = torch.ones(3 * b.numel(), dtype=b.dtype)
    b, i = torch.cat([b, padding]), torch.cat([i, padding])
    entry = PackedTensor.encode(b, i, span, width=width)
    assert entry is not None and entry.misfit(b) is None
    codes, odd = reference.packed_codes(b, i, width, span)
    everything = slice(0, b.numel())
    assert torch.equal(entry.element_codes(everything), codes)
    assert torch.equal(entry.exceptions(everything)[0], odd.nonzero().view(-1))
    for most in few:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pa_kernels.packed.cpu.FEW", most)
            live = b.clone()
            packed = Packed([live], [entry])
            packed.holds(0.0)
            for lam in around(span):
                packed.run_(lam)
                wrong = bits(live) != bits(fresh(b, i, lam))
                assert not bool(wrong.any()), (lam, b[wrong][:3].tolist(), i[wrong][:3].tolist())
            assert packed.wrong() == []


@pytest.mark.parametrize("span", quick_or_slow(WIDE, 2), ids=str)
@pytest.mark.parametrize("width", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reach", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_every_pair_near_every_power_of_two(
    dtype: torch.dtype, width: int, span: tuple[float, float], reach: int
) -> None:
    assert_every_switch_is_right(*at_powers_of_two(dtype, reach), width, span)


@pytest.mark.parametrize(
    "span",
    # inside, and on both sides, on one and on the other
    quick_or_slow([(0.0, 1.0), (-0.37, 2.3), (-0.5, 1.0), (0.0, 1.25), *WIDE[1:]], 2),
    ids=str,
)
@pytest.mark.parametrize("width", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reach", [20, pytest.param(40, marks=pytest.mark.slow)])
def test_every_pair_near_the_smallest_normal_number(
    dtype: torch.dtype, width: int, span: tuple[float, float], reach: int
) -> None:
    # under it the grid grows no finer: what rounds up to it comes from twice as far below as at
    # other powers of two
    assert_every_switch_is_right(*at_powers_of_two(dtype, reach, range(1, 2)), width, span)


@pytest.mark.slow
@pytest.mark.parametrize("span", WIDE, ids=str)
@pytest.mark.parametrize("width", LIMIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_every_exponent(
    dtype: torch.dtype, width: int, span: tuple[float, float]
) -> None:
    # all |k| that 8 bits stand for; of 16 bits all that two weights of one binade can have, or of
    # fp16 every 5th of them
    h, top = MANTISSA[dtype], reference.largest(dtype)
    k = (
        torch.arange(-63, 64)
        if width == 8
        else torch.arange(1 - (1 << h), 1 << h, 1 if h == 7 else 5)
    )
    for low in torch.arange(top + 1).split((1 << 21) // k.numel()):
        b, i = (
            side.reshape(-1) for side in torch.broadcast_tensors(low[:, None], low[:, None] + k)
        )
        inside = i.clamp(0, top) == i
        b, i = (side[inside].to(torch.int16).view(dtype) for side in (b, i))
        assert_every_switch_is_right(b, i, width, span, (-1,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_finds_both_sources_near_every_power_of_two(dtype: torch.dtype) -> None:
    b, i = at_powers_of_two(dtype, 4)
    for span in WIDE:
        codes, odd = reference.packed_codes(b, i, 8, span)
        coded = [side[~odd] for side in (b, i)]
        for lam in around(span)[:4]:
            found = reference.packed_sources(reference.lerp(*coded, lam), codes[~odd], lam)
            assert all(torch.equal(bits(x), bits(y)) for x, y in zip(found, coded)), (span, lam)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_weights_at_the_ends_of_the_range_and_between(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(13)
    for start in range(0, WEIGHTS, 1 << 22):
        count = min(1 << 22, WEIGHTS - start)
        ordinary = torch.randn(count // 2, generator=g) * 0.02
        steps = (1 << (MANTISSA[dtype] - 5)) * torch.randn(count - count // 2, generator=g)
        low = torch.randint(64, reference.largest(dtype) - 200, steps.shape, generator=g)
        step = ordinary + torch.randn(ordinary.shape, generator=g) * 0.02 * 0.02
        b = torch.cat([ordinary.to(dtype), low.to(torch.int16).view(dtype)])
        i = torch.cat(
            [step.to(dtype), (low + steps.int()).clamp(min=0).to(torch.int16).view(dtype)]
        )
        order = torch.randperm(count, generator=g)
        for span in WIDE:
            entry = PackedTensor.encode(b[order], i[order], span)
            assert entry is not None
            live = b[order].clone()
            packed = Packed([live], [entry])
            packed.holds(0.0)
            for lam in (around(span)[k] for k in (0, 1, 3, 4, 5, 1)):
                packed.run_(lam)
                assert torch.equal(bits(live), bits(fresh(b[order], i[order], lam))), (span, lam)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_that_do_not_hold_in_their_range_are_found(dtype: torch.dtype) -> None:
    b, i = at_powers_of_two(dtype, 5)
    b, i = (torch.cat([side, side.new_ones(9000)]) for side in (b, i))
    entry = PackedTensor.encode(b, i)
    assert entry is not None and entry.misfit(b) is None and entry.misfit(b.float()) is None
    wide = replace(entry, span=torch.tensor([-0.2, 1.5]))
    _, odd = reference.packed_codes(b, i, entry.width, (-0.2, 1.5))
    odd[entry.exceptions(slice(0, b.numel()))[0]] = False
    assert wide.misfit(b) == int(odd.byte().argmax())
    coded = int(reference.packed_codes(b, i, entry.width)[1].byte().argmin())
    parity = entry.codes.clone()
    parity[coded] ^= 1  # of 8 bits the first block's codes are in the lower halves of its words
    assert replace(entry, codes=parity).misfit(b) == coded


def test_steps_in_bf16_drift_and_switches_do_not() -> None:
    b, i = pair(100_000, torch.bfloat16, 0.017)
    naive, live = b.clone(), b.clone()
    packed = Packed([live], [PackedTensor.encode(b, i)])  # type: ignore[list-item]
    packed.holds(0.0)
    for step in range(1, 101):
        naive += ((i.float() - b.float()) * 0.01).bfloat16()
        packed.run_(step / 100)
    assert torch.equal(bits(live), bits(i))
    assert float((naive != i).float().mean()) > 0.8


@settings(max_examples=25)
@given(
    st.lists(st.tuples(*[st.integers(-32768, 32767)] * 2), min_size=1, max_size=40),
    st.floats(0, 1, width=32),
)
def test_any_patterns_at_all(patterns: list[tuple[int, int]], lam: float) -> None:
    for dtype in DTYPES:
        b, i = (
            torch.tensor(side, dtype=torch.int16).view(dtype).repeat(200) for side in zip(*patterns)
        )
        entry = PackedTensor.encode(b, i)
        if entry is None:
            continue
        live = b.clone()
        packed_switch_([live], [entry], 0.0, lam)
        packed_switch_([live], [entry], lam, 1.0)
        assert torch.equal(bits(live), bits(i))
        packed_switch_([live], [entry], 1.0, lam)
        packed_switch_([live], [entry], lam, 0.0)
        assert torch.equal(bits(live), bits(b))


def test_both_sides_are_told_from_live_weights_and_the_target_from_the_base() -> None:
    b, i = pair(PACKED_TILE + 5000, torch.bfloat16, 0.044, finite=False)
    entry = PackedTensor.encode(b, i)
    assert entry is not None
    for span in (slice(0, b.numel()), slice(PACKED_TILE, b.numel())):
        found = packed_pair(reference.lerp(b, i, 0.3), entry, span, reference.fp32(0.3))
        assert torch.equal(bits(found[0]), bits(b[span])) and torch.equal(
            bits(found[1]), bits(i[span])
        )
        assert torch.equal(bits(packed_target(b[span], entry, span)), bits(i[span]))


@pytest.mark.parametrize("width", LIMIT)
def test_codes_with_the_parity_of_the_lower_pattern_become_those_with_the_bases(width: int) -> None:
    b, i = pair(70_001, torch.bfloat16, 0.044)
    entry = PackedTensor.encode(b, i, width=width)
    assert entry is not None
    k, everything = (bits(i) - bits(b)).int(), slice(0, entry.numel)
    lower = torch.where(k < 0, bits(i), bits(b)) & 1
    coded = reference.packed_codes(b, i, width)[1].logical_not()
    earlier = replace(entry, codes=of_lower_parity(entry.codes, width))
    assert not torch.equal(earlier.codes, entry.codes)
    expected = torch.where(coded, 2 * k + lower, 0).to(torch.int16)
    assert torch.equal(earlier.element_codes(everything), expected)
    assert torch.equal(of_lower_parity(earlier.codes, width), entry.codes)


def test_one_lambda_for_each_tensor_and_foreign_writes_by_entry() -> None:
    sources = [pair(5000 + k, torch.bfloat16, 0.017 * (k + 1), seed=k) for k in range(3)]
    live = [b.clone() for b, _ in sources]
    packed = Packed(live, [PackedTensor.encode(b, i) for b, i in sources])  # type: ignore[misc]
    packed.holds(0.0)
    packed.run_([0.1, 0.6, 1.0])
    for w, (b, i), lam in zip(live, sources, (0.1, 0.6, 1.0)):
        assert torch.equal(bits(w), bits(reference.lerp(b, i, lam)))
    live[1][77] += 1
    packed.run_(0.5)
    assert packed.wrong() == [1]


def test_a_lambda_outside_the_range_changes_nothing() -> None:
    b, i = pair(5000, torch.bfloat16, 0.017)
    live = b.clone()
    packed = Packed([live], [PackedTensor.encode(b, i)])  # type: ignore[list-item]
    packed.holds(0.0)
    for lam in (-0.1, 1.0001):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            packed.run_(lam)
    assert torch.equal(bits(live), bits(b))


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 12},
        {"dtype": torch.float32},
        {"codes": torch.zeros(3, dtype=torch.int16)},
        {"starts": torch.tensor([0, 10**6], dtype=torch.int32)},
        {"starts": torch.tensor([1, 0], dtype=torch.int32)},
        {"where": "beyond"},
        {"where": "twice"},
        {"where": "past its tile"},
        {"starts": torch.tensor([0, 1], dtype=torch.int32, device="meta")},
        {"span": torch.tensor([0.5, 1.0])},
        {"span": torch.tensor([0.0, math.nan])},
        {"base": torch.zeros(2, dtype=torch.bfloat16)},
        {"crossing": None},
        {"crossing_starts": None},
        {"crossing_starts": torch.tensor([0, 10**6], dtype=torch.int32)},
        {"crossing": torch.zeros(3, dtype=torch.int32)},
        {"crossing": torch.tensor([5000], dtype=torch.uint16), "crossing_starts": "one"},
        {"crossing": torch.tensor([5, 5], dtype=torch.uint16), "crossing_starts": "two"},
    ],
    ids=str,
)
def test_a_tensor_that_would_lead_a_switch_astray_is_refused(changes: dict[str, Any]) -> None:
    b, i = pair(5000, torch.bfloat16, 0.05)
    entry = PackedTensor.encode(b, i, layout="speed")
    assert entry is not None
    entry.check()
    if isinstance(changes.get("crossing_starts"), str):
        count = changes["crossing"].numel()
        changes = {**changes, "crossing_starts": torch.tensor([0, count], dtype=torch.int32)}
    if isinstance(changes.get("where"), str):
        where = entry.where.clone().int()
        last = {"beyond": 5000, "twice": where[-2], "past its tile": PACKED_TILE + 1}
        where[-1] = last[changes["where"]]
        changes = {"where": where.to(torch.uint16)}
    with pytest.raises(ValueError):
        replace(entry, **changes).check()


def test_live_tensors_that_do_not_fit_are_refused() -> None:
    b, i = pair(5000, torch.bfloat16, 0.05)
    entry = PackedTensor.encode(b, i)
    assert entry is not None
    for live, error in (
        (b.float(), TypeError),
        (b[:-1], ValueError),
        (b.half(), ValueError),
        (b.repeat(2)[::2], ValueError),
    ):
        with pytest.raises(error, match="entry 0"):
            Packed([live], [entry])

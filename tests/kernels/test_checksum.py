"""Word sums on the CPU, against the reference and for what they must notice."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import Checksum, checksum, reference

sums = sys.modules["pa_kernels.checksum"]
CHUNK_BYTES = reference.CHUNK_WORDS * 8
DTYPES = [
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        7,
        8,
        9,
        4096,
        CHUNK_BYTES - 8,
        CHUNK_BYTES - 1,
        CHUNK_BYTES,
        CHUNK_BYTES + 5,
        3 * CHUNK_BYTES + 77,
    ],
)
@pytest.mark.parametrize("skip", [0, 1, 2, 8])
def test_equals_the_reference(size: int, skip: int) -> None:
    data = torch.randint(0, 256, (size + skip,), dtype=torch.uint8)[skip:]
    assert checksum([data]) == [reference.checksum(data)]


def test_more_than_one_piece_and_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE_CHUNKS", 3)
    sums.high_factors.cache_clear()
    large = torch.randint(0, 256, (10 * CHUNK_BYTES + 12_345,), dtype=torch.uint8)
    tensors = [
        large[:5],
        large,
        large[:0],
        large[: 6 * CHUNK_BYTES],
        large[3 : 6 * CHUNK_BYTES + 9],
    ]
    assert checksum(tensors) == [reference.checksum(tensor) for tensor in tensors]
    sums.high_factors.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_shape(dtype: torch.dtype) -> None:
    tensor = (torch.randn(7, 3, 5) * 20).to(dtype)
    assert checksum([tensor, tensor[1:], tensor[0, 0, 0]]) == [
        reference.checksum(t) for t in (tensor, tensor[1:], tensor[0, 0, 0])
    ]


def test_no_tensors() -> None:
    assert checksum([]) == []


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_hypothesis(blobs: list[bytes]) -> None:
    tensors = [torch.tensor(list(blob), dtype=torch.uint8) for blob in blobs]
    assert checksum(tensors) == [reference.checksum(tensor) for tensor in tensors]


def test_notices_one_bit_a_swap_and_a_shift() -> None:
    tensor = torch.randn(40_000).bfloat16()
    (clean,) = checksum([tensor])
    for at in (0, 1, 17_000, 39_999):
        for bit in (0, 7, 15):
            changed = tensor.clone()
            changed.view(torch.int16)[at] ^= 1 << bit if bit < 15 else -(1 << 15)
            assert checksum([changed]) != [clean]
    swapped = tensor.clone()
    swapped[:4], swapped[32_768:32_772] = tensor[32_768:32_772], tensor[:4].clone()
    assert checksum([swapped]) != [clean]
    assert checksum([tensor.roll(4)]) != [clean]


def test_parameters_and_inference_tensors() -> None:
    parameter = torch.nn.Parameter(torch.randn(100))
    with torch.inference_mode():
        frozen = parameter.clone()
    assert checksum([parameter, frozen]) == [reference.checksum(parameter)] * 2


def test_non_contiguous_is_refused_by_entry() -> None:
    with pytest.raises(ValueError, match=r"entry 1: strides \(1, 4\)"):
        checksum([torch.zeros(3), torch.zeros(5, 4).t()])


def test_prepared_once_it_sums_what_the_tensors_hold_now() -> None:
    tensors = [torch.randn(70_000).bfloat16(), torch.randn(3)]
    prepared = Checksum(tensors)
    assert prepared.sums() == [reference.checksum(tensor) for tensor in tensors]
    tensors[0][69_999] += 1
    assert prepared.sums() == [reference.checksum(tensor) for tensor in tensors]


# --- versions, and what the fold of version 2 is for

WORDS = reference.CHUNK_WORDS


def test_version_1_is_still_computed() -> None:
    """Of files that earlier versions wrote: see also `test_checksum_of_known_bytes`."""
    for data in (torch.arange(100_000, dtype=torch.int32), torch.randn(50_001).bfloat16()):
        assert checksum([data], version=1) == [reference.checksum(data, version=1)]
        assert checksum([data], version=1) != checksum([data])
    assert checksum([torch.arange(100_000, dtype=torch.int32)], 1) == [0x2030E0D489519B80]


@pytest.mark.parametrize("bit", [0, 15, 31, 32, 47, 62, 63])
def test_two_flips_of_one_bit_do_not_cancel(bit: int) -> None:
    """In version 1 two flips of bit 63 always do, and of the bits below it often."""
    words = torch.randint(-(2**63), 2**63 - 1, (3 * WORDS,))
    clean = checksum([words], 1) + checksum([words])
    missed = [0, 0]
    flip = torch.tensor(1 << bit if bit < 63 else -(2**63))
    for i, j in [(0, 1), (5, 8191), (5, 8192), (17, 20_000), (8_191, 16_384), *_pairs(200)]:
        changed = words.clone()
        changed[[i, j]] ^= flip
        found = checksum([changed], 1) + checksum([changed])
        missed = [n + (a == b) for n, a, b in zip(missed, found, clean)]
    assert missed[1] == 0
    if bit == 63:
        assert missed[0] == 205


def _pairs(count: int) -> list[tuple[int, int]]:
    draw = torch.Generator().manual_seed(7)
    pairs = torch.randint(0, 3 * WORDS, (count, 2), generator=draw)
    return [(int(i), int(j)) for i, j in pairs if i != j][:count]


def test_no_two_factors_of_a_chunk_cancel() -> None:
    """The condition under which every pair of flips of one bit within a chunk is seen."""
    low = reference.odd_low(torch.arange(WORDS))
    assert int(low.min()) > 0 and int(low.max()) < 2**33
    assert low.unique().numel() == WORDS
    assert not torch.isin((2**33 - low), low).any()


def test_two_words_of_one_fold() -> None:
    """The lattice of (x, y) with x + (2³² + FOLD)·y ≡ 0 mod 2⁶⁴, x and y the differences of the two
    halves, has one pair of points within 2³²."""
    modulus, factor = 2**64, 2**32 + reference.FOLD[2]
    u, v = (-factor % modulus, 1), (modulus, 0)
    while True:  # Gauss's reduction
        u, v = sorted((u, v), key=lambda p: p[0] ** 2 + p[1] ** 2)
        squared = u[0] ** 2 + u[1] ** 2
        k = (2 * (u[0] * v[0] + u[1] * v[1]) + squared) // (2 * squared)
        if k == 0:
            break
        v = v[0] - k * u[0], v[1] - k * u[1]
    points = {
        (a * u[0] + b * v[0], a * u[1] + b * v[1]) for a in range(-9, 10) for b in range(-9, 10)
    }
    small = {p for p in points if p != (0, 0) and max(map(abs, p)) < 2**32}
    assert small == {(793665977, -3281063053), (-793665977, 3281063053)}


def test_folds_of_elements_add_up_to_the_fold_of_their_word() -> None:
    """Kernels sum tails and exceptions element by element."""
    words = torch.randint(-(2**63), 2**63 - 1, (1000,))
    words[:4] = torch.tensor([-1, -(2**63), 2**63 - 1, 0])
    elements = words.view(torch.int16).view(-1, 4).long() & 0xFFFF
    places = elements << torch.tensor([0, 16, 32, 48])
    assert torch.equal(reference.folded(places).sum(1), reference.folded(words))

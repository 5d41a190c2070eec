"""Word sums on the CPU, against the reference and for what they must notice."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import checksum, reference

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
    sums._high_factors.cache_clear()
    large = torch.randint(0, 256, (10 * CHUNK_BYTES + 12_345,), dtype=torch.uint8)
    tensors = [
        large[:5],
        large,
        large[:0],
        large[: 6 * CHUNK_BYTES],
        large[3 : 6 * CHUNK_BYTES + 9],
    ]
    assert checksum(tensors) == [reference.checksum(tensor) for tensor in tensors]
    sums._high_factors.cache_clear()


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

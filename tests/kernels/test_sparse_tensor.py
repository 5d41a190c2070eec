"""Sparse tensors: what is encoded is what is decoded, in the bytes that are promised, and hostile
content is refused."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import SparseTensor, parts, sparse
from pa_kernels.reference import BITMAP_TILE, INDEX_TILE
from torch import Tensor

KINDS = ("index", "bitmap")
SIZES = (1, 31, 32, 33, 4095, 4096, 4097, 65_535, 65_536, 65_537, 200_001)


def mask_of(size: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density


def encoded(mask: Tensor, kind: sparse.SparseKind | None = None) -> SparseTensor:
    values = torch.arange(int(mask.sum())).bfloat16()
    return SparseTensor.encode(mask, values, -values, mask.numel(), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.05, 0.5, 1.0])
def test_what_is_encoded_is_decoded(kind: sparse.SparseKind, density: float) -> None:
    for size in SIZES:
        mask = mask_of(size, density, seed=size)
        positions = mask.nonzero().view(-1)
        made = encoded(mask, kind)
        made.check()
        assert torch.equal(made.positions(), positions)
        assert (
            made.nbytes
            == sparse.position_bytes(kind, size, positions.numel()) + 4 * positions.numel()
        )
        listed = SparseTensor.encode(positions, made.base, made.target, size, kind=kind)
        assert torch.equal(listed.where, made.where) and torch.equal(listed.starts, made.starts)
        as_index = made.as_index()
        as_index.check()
        assert as_index.kind == "index" and torch.equal(as_index.positions(), positions)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_one_span(kind: sparse.SparseKind) -> None:
    with mock.patch.object(sparse, "SPAN", 1 << 16):
        mask = mask_of(300_001, 0.03)
        mask[70_000:200_000] = False
        made = encoded(mask, kind)
        made.check()
        assert torch.equal(made.positions(), mask.nonzero().view(-1))
        assert torch.equal(encoded(mask.view(1, -1), kind).where, made.where)
        assert torch.equal(made.as_index().positions(), made.positions())


def test_layout_of_known_positions_never_changes() -> None:
    # constants of the format: files hold these tensors
    positions = torch.tensor([0, 31, 32, 4096, 65_535, 65_536, 131_080])
    values = torch.zeros(7)
    index = SparseTensor.encode(positions, values, values, 131_081, kind="index")
    assert index.where.tolist() == [0, 31, 32, 4096, 65_535, 0, 8]
    assert index.starts.tolist() == [0, 5, 6, 7]
    bitmap = SparseTensor.encode(positions, values, values, 131_081, kind="bitmap")
    assert bitmap.where.shape == (33 * 128,) and bitmap.where[:2].tolist() == [1 - 2**31, 1]
    assert (
        bitmap.where[128].item() == 1
        and bitmap.where[2047].item() == -(2**31)
        and bitmap.where[-128].item() == 1 << 8
    )
    assert bitmap.starts.tolist() == [0, 3] + [4] * 14 + [5] + [6] * 16 + [7]


def test_the_smaller_kind_is_chosen() -> None:
    size = 1 << 20
    for density, kind in ((0.01, "index"), (0.06, "index"), (0.067, "bitmap"), (0.5, "bitmap")):
        made = encoded(mask_of(size, density))
        assert made.kind == kind
        other = encoded(mask_of(size, density), next(k for k in KINDS if k != kind))
        assert made.nbytes < other.nbytes
    assert encoded(torch.zeros(0, dtype=torch.bool)).kind == "index"


@pytest.mark.parametrize("kind", KINDS)
def test_no_elements_and_no_positions(kind: sparse.SparseKind) -> None:
    for size in (0, 5, 100_000):
        made = encoded(torch.zeros(size, dtype=torch.bool), kind)
        made.check()
        assert made.count == 0 and made.positions().numel() == 0 and made.as_index().count == 0


@settings(max_examples=60)
@given(st.integers(1, 3 * BITMAP_TILE), st.sets(st.integers(0, 3 * BITMAP_TILE - 1), max_size=50))
def test_hypothesis(size: int, places: set[int]) -> None:
    positions = torch.tensor(sorted(p for p in places if p < size), dtype=torch.int64)
    values = torch.zeros(positions.numel())
    for kind in KINDS:
        made = SparseTensor.encode(positions, values, values, size, kind=kind)
        made.check()
        assert torch.equal(made.positions(), positions)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (torch.tensor([3, 2]), ValueError, "position 2 follows 3, expected ascending"),
        (torch.tensor([3, 3]), ValueError, "position 3 follows 3"),
        (torch.tensor([-1, 3]), ValueError, "positions from -1 to 3, expected within 10"),
        (torch.tensor([3, 10]), ValueError, "positions from 3 to 10, expected within 10"),
        (torch.tensor([3]), ValueError, "1 positions and 2 base values"),
        (torch.tensor([3, 4, 5]), ValueError, "3 positions and 2 base values"),
        (torch.tensor([3, 4], dtype=torch.int32), TypeError, r"positions are torch.int32 \(2,\)"),
        (torch.tensor([[3, 4]]), TypeError, r"torch.int64 \(1, 2\)"),
        (torch.ones(11, dtype=torch.bool), ValueError, "a mask of 11 elements for a tensor of 10"),
    ],
)
def test_what_encode_refuses(where: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseTensor.encode(where, torch.zeros(2), torch.zeros(2), 10)


def test_positions_that_fall_at_a_span_s_edge_are_refused() -> None:
    positions = torch.arange(70_000)
    positions[1 << 16] = 5
    with (
        mock.patch.object(sparse, "SPAN", 1 << 16),
        pytest.raises(ValueError, match="position 5 follows 65535"),
    ):
        SparseTensor.encode(positions, torch.zeros(70_000), torch.zeros(70_000), 70_000)


def test_values_must_be_as_many_and_of_a_live_dtype() -> None:
    for base, target, message in (
        (torch.zeros(2), torch.zeros(3), r"target has shape \(3,\), expected \(2,\)"),
        (torch.zeros(2).double(), torch.zeros(2), "base is torch.float64, expected bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseTensor.encode(torch.tensor([1, 4]), base, target, 10)


def changed(tensor: Tensor, at: int, value: int) -> Tensor:
    """A copy with one element set, in dtypes that torch cannot index as well."""
    listed = tensor.tolist()
    listed[at] = value
    return torch.tensor(listed, dtype=tensor.dtype)


GOOD_INDEX = encoded(torch.arange(INDEX_TILE + 1000) % 1000 == 7, "index")
GOOD_BITMAP = encoded(torch.arange(2 * BITMAP_TILE + 100) % 100 == 7, "bitmap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "coo"}, "kind is 'coo', expected 'index' or 'bitmap'"),
        ({"numel": -1}, "numel is -1"),
        ({"numel": 1.5}, "numel is 1.5"),
        ({"numel": 2**62}, r"starts has shape \(3,\), expected \(70368744177665,\)"),
        ({"numel": INDEX_TILE}, r"starts has shape \(3,\), expected \(2,\)"),
        ({"numel": 66_007}, "position 66007 in a tensor of 66007 elements"),
        ({"where": GOOD_INDEX.where[:-1]}, r"where has shape \(66,\), expected \(67,\)"),
        ({"where": GOOD_INDEX.where.int()}, "where is torch.int32, expected uint16"),
        (
            {"where": changed(GOOD_INDEX.where, 4, 2007)},
            "place 2007 of entry 4 follows place 3007 in one tile",
        ),
        (
            {"where": changed(GOOD_INDEX.where, 4, 3007)},
            "place 3007 of entry 4 follows place 3007 in one tile",
        ),
        (
            {"where": changed(GOOD_INDEX.where, 66, 65_535)},
            "position 131071 in a tensor of 66536 elements",
        ),
        ({"starts": GOOD_INDEX.starts.int()}, "starts is torch.int32, expected int64"),
        (
            {"starts": changed(GOOD_INDEX.starts, 0, 1)},
            "starts go from 1 to 67, expected ascending from 0 to 67",
        ),
        (
            {"starts": changed(GOOD_INDEX.starts, 2, 66)},
            "starts go from 0 to 66, expected ascending from 0 to 67",
        ),
        (
            {"starts": changed(GOOD_INDEX.starts, 1, 68)},
            "starts go from 0 to 68, expected ascending from 0 to 67",
        ),
        (
            {"starts": changed(GOOD_INDEX.starts, 1, -(2**63))},
            "starts go from -9223372036854775808 to 67",
        ),
        (
            {"starts": changed(GOOD_INDEX.starts, 1, 67)},
            "place 471 of entry 66 follows place 65007 in one tile",
        ),
        ({"base": GOOD_INDEX.base[:-1]}, r"where has shape \(67,\), expected \(66,\)"),
        ({"target": GOOD_INDEX.target[:-1]}, r"target has shape \(66,\), expected \(67,\)"),
        (
            {"target": GOOD_INDEX.target.view(torch.int16)},
            "target is torch.int16, expected bfloat16, float16 or",
        ),
        ({"base": GOOD_INDEX.base.view(1, -1)}, r"base has shape \(1, 67\), expected \(67,\)"),
        ({"target": torch.zeros(134)[::2]}, r"target has stride \(2,\), expected contiguous"),
        ({"target": GOOD_INDEX.target.to("meta")}, "target is on meta, other parts on cpu"),
    ],
)
def test_hostile_index_lists_are_refused(change: dict[str, object], message: str) -> None:
    GOOD_INDEX.check()
    with pytest.raises(ValueError, match=message):
        replace(GOOD_INDEX, **change).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numel": 8207}, "position 8207 in a tensor of 8207 elements"),
        ({"where": GOOD_BITMAP.where[:-1]}, r"where has shape \(383,\), expected \(384,\)"),
        (
            {"where": changed(GOOD_BITMAP.where, 5, -1)},
            "bits are set in tile 0, expected 41 by starts",
        ),
        (
            {"where": changed(GOOD_BITMAP.where, 256, 0)},
            "0 bits are set in tile 2, expected 1 by starts",
        ),
        (
            {"where": changed(changed(GOOD_BITMAP.where, 256, 0), 383, -(2**31))},
            "position 12287 in a tensor of 8292",
        ),
        (
            {"starts": changed(GOOD_BITMAP.starts, 1, 40)},
            "41 bits are set in tile 0, expected 40 by starts",
        ),
        ({"kind": "index"}, "where is torch.int32, expected uint16"),
    ],
)
def test_hostile_bitmaps_are_refused(change: dict[str, object], message: str) -> None:
    GOOD_BITMAP.check()
    with pytest.raises(ValueError, match=message):
        replace(GOOD_BITMAP, **change).check()


def test_faults_beyond_the_first_span_are_found() -> None:
    values = torch.zeros(30_000)
    index, bitmap = (
        SparseTensor.encode(torch.arange(30_000) * 2, values, values, 60_000, kind=kind)
        for kind in KINDS
    )
    with mock.patch.object(sparse, "SPAN", 1 << 12), mock.patch.object(parts, "CPU_SPAN", 1 << 12):
        index.check()
        bitmap.check()
        for at in (1, 4096, 4097, 8192, 29_999):
            with pytest.raises(ValueError, match=f"of entry {at} follows"):
                replace(index, where=changed(index.where, at, 2 * at - 2)).check()
        for word in (0, 128, 1800):
            with pytest.raises(ValueError, match=f"bits are set in tile {word // 128}, "):
                replace(bitmap, where=changed(bitmap.where, word, 0)).check()

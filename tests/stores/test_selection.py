"""Selections against the plainest numpy: what is kept, how ties go, and that cutting and order
never matter."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from pa_fast.stores import selection
from pa_fast.stores.sparse import SparseStore
from tests.stores import pairs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def delta(base: torch.Tensor, instruct: torch.Tensor) -> np.ndarray:
    return np.abs(instruct.float().numpy().ravel() - base.float().numpy().ravel())


def first_largest(magnitudes: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest, the earlier one where two are equal, and none that is 0."""
    order = np.lexsort((np.arange(magnitudes.size), -magnitudes))[:count]
    mask = np.zeros(magnitudes.size, bool)
    mask[order] = True
    return mask & (magnitudes > 0)


@pytest.fixture(params=[1 << 20, 1000], ids=["one piece", "many pieces"])
def span(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(selection, "SPAN", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 17, 500, 4000, 10_000])
def test_the_largest_are_those_that_a_sort_finds(dtype: torch.dtype, count: int, span: int) -> None:
    g = torch.Generator().manual_seed(1)
    b = torch.randn(10_000, generator=g).to(dtype)
    # many ties, many zeros
    i = (b.float() + torch.randint(-3, 4, b.shape, generator=g) * 2.0**-6).to(dtype)
    found, _ = selection.above(selection.largest_cut(lambda: [(b, i)], count), b, i)
    assert np.array_equal(found.numpy(), first_largest(delta(b, i), count))


def test_a_global_cut_goes_over_tensors_in_order(span: int) -> None:
    b, i = pairs.pair(changed=0.3)
    flat = [(b[name].view(-1), i[name].view(-1)) for name in b]
    cut, masks = selection.largest_cut(lambda: flat, 1500), []
    for one in flat:
        mask, cut = selection.above(cut, *one)
        masks.append(mask.numpy())
    expected = first_largest(np.concatenate([delta(*one) for one in flat]), 1500)
    assert np.array_equal(np.concatenate(masks), expected) and cut.ties == 0


def test_nan_stands_above_all_and_infinity_next() -> None:
    b, i = torch.zeros(5), torch.tensor([1.0, float("-inf"), 3e38, float("nan"), 0.0])
    for count, expected in ((1, {3}), (2, {1, 3}), (3, {1, 2, 3})):
        mask, _ = selection.above(selection.largest_cut(lambda: [(b, i)], count), b, i)
        assert set(mask.nonzero().view(-1).tolist()) == expected


@pytest.mark.parametrize(("base", "instruct"), [(a, b) for a in DTYPES for b in DTYPES])
def test_changed_is_every_bit_that_some_lambda_can_see(
    base: torch.dtype, instruct: torch.dtype, span: int
) -> None:
    b = torch.tensor([1.0, 0.0, 1.0009765625, 2.0, 0.1]).to(base)
    i = torch.tensor([1.0, -0.0, 1.0009765625, 2.5, 0.1]).to(instruct)
    expected = b.float().numpy().view(np.int32) != i.float().numpy().view(np.int32)
    assert np.array_equal(selection.changed(b, i).numpy(), expected)
    assert expected[1] and expected[3]


def mix(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def test_the_draw_is_the_hash_of_name_place_and_seed(span: int) -> None:
    b, i = torch.zeros(20_000), torch.ones(20_000)
    i[::7] = 0
    place, seed = np.arange(20_000, dtype=np.uint64), 12345
    noise = mix(place ^ mix(np.array([zlib.crc32(b"w") ^ seed], np.uint64)))
    expected = (noise < int(0.3 * 2**32)) & (i.numpy() != 0)
    found = selection.dare_mask("w", b, i, 0.3, seed).numpy()
    assert np.array_equal(found, expected)
    assert abs(found.sum() / (i != 0).sum().item() - 0.3) < 0.02
    assert not np.array_equal(found, selection.dare_mask("v", b, i, 0.3, seed).numpy())
    assert not np.array_equal(found, selection.dare_mask("w", b, i, 0.3, seed + 1).numpy())


def test_the_draw_of_neighbours_and_of_seeds_is_independent() -> None:
    b, i = torch.zeros(1 << 18), torch.ones(1 << 18)
    one = selection.dare_mask("w", b, i, 0.5, 0).double() - 0.5
    for other in (
        one.roll(1),
        one.roll(4096),
        selection.dare_mask("w", b, i, 0.5, 1).double() - 0.5,
    ):
        # of independent fair coins this is a standard normal number
        assert abs(float((4 * one * other).sum()) / (1 << 9)) < 4


@pytest.mark.parametrize(
    "store",
    [SparseStore("topk", 0.05, "global"), SparseStore("dare", 0.4, seed=3), SparseStore("ties")],
)
def test_an_encoder_gives_the_same_again_and_on_any_number_of_cores(store: SparseStore) -> None:
    b, i = pairs.pair(changed=0.4)
    made = []
    threads = torch.get_num_threads()
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        made.append(pairs.ends(store, b, i)[0])
    torch.set_num_threads(threads)
    assert all(torch.equal(made[0][name], other[name]) for other in made[1:] for name in b)

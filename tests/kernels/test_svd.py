"""The truncated SVD against numpy's: its error, its energies, and that blocks, dtypes and threads
do not matter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from pa_kernels import LowRank, truncated_svd
from pa_kernels.svd import EXACT_SHARE, Truncated, factors, rank_for_energy
from torch import Tensor

SHAPES = [(200, 200), (140, 330), (330, 140)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What numpy and torch do here is small: on busy cores threads would wait longer for each other
    than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def delta(shape: tuple[int, int], spectrum: str) -> Tensor:
    """A matrix of this shape with one of the spectra that deltas may have, or worse."""
    generator = torch.Generator().manual_seed(1)
    if spectrum == "random":
        return torch.randn(shape, generator=generator) * 1e-3
    count = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, count, generator=generator))[0] for side in shape)
    k = torch.arange(1, count + 1, dtype=torch.float32)
    return (
        u
        * {
            "flat": torch.ones(count),
            "1/√k": k**-0.5,
            "1/k": 1 / k,
            "exponential": torch.exp(-k / 20),
        }[spectrum]
    ) @ v.t()


def error(found: Truncated, of: Tensor) -> float:
    return float(torch.linalg.norm(of.double() - (found.u.double() * found.s) @ found.v.double()))


@pytest.mark.parametrize("spectrum", ["random", "flat", "1/√k", "1/k", "exponential"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_one_per_cent_of_the_best(shape: tuple[int, int], spectrum: str) -> None:
    of = delta(shape, spectrum)
    values = np.linalg.svd(of.double().numpy(), compute_uv=False)
    for rank in (4, 45):
        assert EXACT_SHARE * rank < min(shape)
        found = truncated_svd(torch.zeros(shape), of, rank)
        best = math.sqrt((values[rank:] ** 2).sum())
        assert best * (1 - 1e-4) - 1e-6 <= error(found, of) <= best * 1.01 + 1e-6, rank
        assert found.energy == pytest.approx((values**2).sum(), rel=1e-6)
        assert found.captured <= (values[:rank] ** 2).sum() * (1 + 1e-5)
        assert found.relative_error == pytest.approx(
            error(found, of) / math.sqrt(found.energy), abs=1e-3
        )


def test_without_power_a_random_matrix_is_missed_by_more() -> None:
    of = delta((200, 200), "random")
    best = error(truncated_svd(torch.zeros(200, 200), of, 45), of)
    assert (
        error(truncated_svd(torch.zeros(200, 200), of, 45, power=0, oversample=8), of) > 1.05 * best
    )


@pytest.mark.parametrize("rank", [1, 40, 100, 150])
def test_the_parts_are_what_they_are_called(rank: int) -> None:
    of = delta((150, 260), "1/√k")
    found = truncated_svd(torch.zeros(150, 260), of, rank)
    assert (
        found.u.shape == (150, rank) and found.s.shape == (rank,) and found.v.shape == (rank, 260)
    )
    assert {x.dtype for x in (found.u, found.s, found.v)} == {torch.float32}
    assert torch.allclose(found.u.t() @ found.u, torch.eye(rank), atol=1e-5)
    assert torch.allclose(found.v @ found.v.t(), torch.eye(rank), atol=1e-5)
    assert bool((found.s.diff() <= 0).all()) and bool((found.s >= 0).all())
    assert found.v.is_contiguous() and not found.v.is_inference()


@pytest.mark.parametrize("rank", [60, 149, 150])
def test_a_large_rank_is_exact(rank: int) -> None:
    of = delta((150, 220), "random")
    values = np.linalg.svd(of.double().numpy(), compute_uv=False)
    found = truncated_svd(torch.zeros(150, 220), of, rank)
    assert np.allclose(found.s.numpy(), values[:rank], rtol=1e-4)
    assert error(found, of) <= math.sqrt((values[rank:] ** 2).sum()) * 1.0001 + 1e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spectrum", ["random", "1/k"])
def test_pieces_change_nothing_but_the_last_bits(spectrum: str, threads: int) -> None:
    of = delta((301, 200), spectrum)
    base = torch.randn(301, 200, generator=torch.Generator().manual_seed(5))
    whole = truncated_svd(base, base + of, 20)
    torch.set_num_threads(threads)
    with mock.patch("pa_kernels.svd.CPU_PIECE", 200 * 37):
        pieces = truncated_svd(base, base + of, 20)
    assert torch.allclose(whole.s, pieces.s, rtol=1e-4)
    assert whole.energy == pytest.approx(pieces.energy, rel=1e-9)
    assert error(pieces, of) == pytest.approx(error(whole, of), rel=1e-3)


def test_the_number_of_cores_changes_no_bit() -> None:
    of = delta((301, 200), "random")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with mock.patch("pa_kernels.svd.CPU_PIECE", 200 * 37):
            found.append(truncated_svd(torch.zeros(301, 200), of, 20))
    assert (
        torch.equal(found[0].s, found[1].s)
        and torch.equal(found[0].u, found[1].u)
        and torch.equal(found[0].v, found[1].v)
    )


def test_mixed_dtypes_and_a_seed() -> None:
    base = (torch.randn(90, 120, generator=torch.Generator().manual_seed(2)) * 0.02).half()
    inst = (base.float() + delta((90, 120), "1/k")).bfloat16()
    once, again, other = (truncated_svd(base, inst, 8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(once.u, again.u) and torch.equal(once.v, again.v)
    assert not torch.equal(once.u, other.u)
    difference = inst.double() - base.double()
    assert once.energy == pytest.approx(float(difference.square().sum()), rel=1e-9)
    assert error(once, difference) == pytest.approx(error(other, difference), rel=1e-3)


def test_rank_0_and_equal_sources() -> None:
    of = delta((50, 60), "random")
    nothing = truncated_svd(torch.zeros(50, 60), of, 0)
    assert (
        nothing.u.shape == (50, 0) and nothing.v.shape == (0, 60) and nothing.relative_error == 1.0
    )
    equal = truncated_svd(of, of, 5)
    assert (
        equal.energy == 0
        and equal.relative_error == 0
        and bool((equal.s == 0).all())
        and bool(equal.u.isfinite().all())
    )


def test_rank_for_energy() -> None:
    found = Truncated(
        torch.zeros(9, 3), torch.tensor([2.0, 1.0, 1.0]), torch.zeros(3, 9), energy=8.0
    )
    assert [rank_for_energy(found, share) for share in (0.0, 0.1, 0.5, 0.6, 0.75, 0.8)] == [
        0,
        1,
        1,
        2,
        3,
        None,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_factors_merge_to_the_approximation(dtype: torch.dtype) -> None:
    base = torch.randn(80, 100, generator=torch.Generator().manual_seed(2))
    of = delta((80, 100), "exponential")
    found = truncated_svd(base, base + of, 20)
    u, v = factors(found, 18, dtype)
    assert u.shape == (80, 18) and v.shape == (18, 100) and u.dtype == v.dtype == dtype
    live = torch.empty(80, 100)
    LowRank([live], [base], [u], [v]).run_(1.0)
    approximation = (found.u[:, :18] * found.s[:18]) @ found.v[:18]
    assert torch.linalg.norm(live - base - approximation) < 0.01 * torch.linalg.norm(of)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 5}, ValueError, r"rank 5, expected 0 to 4 for shape \(4, 6\)"),
        ({"rank": -1}, ValueError, "rank -1"),
        ({"inst": torch.zeros(6, 4)}, ValueError, r"instruct has shape \(6, 4\)"),
        ({"inst": torch.zeros(4, 6, device="meta")}, ValueError, "on meta"),
        ({"base": torch.zeros(24), "inst": torch.zeros(24)}, ValueError, r"base has shape \(24,\)"),
        ({"base": torch.zeros(4, 6).long()}, TypeError, "base is torch.int64"),
        ({"inst": torch.full((4, 6), math.inf)}, ValueError, "not finite"),
        ({"power": -1}, ValueError, "power -1"),
        ({"oversample": -2}, ValueError, "oversample -2"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        truncated_svd(**{"base": torch.zeros(4, 6), "inst": torch.ones(4, 6), "rank": 2, **change})

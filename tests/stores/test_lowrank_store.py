"""Low-rank deltas: what is of low rank comes back, the error is what the singular values say, ranks
follow their options."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pa_fast.errors import UsageError
from pa_fast.stores.lowrank import Factors, LowRankStore, spend
from pa_fast.stores.store import DenseEntry
from tests.stores import pairs

SHAPES = {"q": (96, 128), "experts": (3, 80, 64), "norm": (64,), "small": (8, 12)}


def error(entry: Factors, base: torch.Tensor, instruct: torch.Tensor) -> float:
    delta = instruct.double() - base.double()
    return float((delta - entry.u.double() @ entry.v.double()).norm() / delta.norm())


def best(base: torch.Tensor, instruct: torch.Tensor, rank: int) -> float:
    """The smallest error that this rank allows, by numpy."""
    s = np.linalg.svd((instruct.double() - base.double()).numpy(), compute_uv=False)
    return float(np.sqrt((s[..., rank:] ** 2).sum() / (s**2).sum()))


def test_the_error_is_that_of_the_best_cut() -> None:
    b, i = pairs.pair(torch.float32, changed=1.0, shapes=SHAPES)
    made = dict(zip(b, LowRankStore(rank=16).encode(pairs.sources(b, i))))
    for name in ("q", "experts"):
        entry = made[name]
        assert isinstance(entry, Factors) and entry.u.shape[-1] == 16 == entry.v.shape[-2]
        assert error(entry, b[name], i[name]) == pytest.approx(best(b[name], i[name], 16), rel=0.01)
    for name in ("norm", "small"):
        assert isinstance(made[name], DenseEntry) and torch.equal(made[name].target, i[name])


def test_a_delta_of_low_rank_comes_back() -> None:
    g = torch.Generator().manual_seed(0)
    b = {"w": torch.randn(128, 96, generator=g)}
    i = {"w": b["w"] + torch.randn(128, 8, generator=g) @ torch.randn(8, 96, generator=g)}
    (entry,) = LowRankStore(rank=8).encode(pairs.sources(b, i))
    assert isinstance(entry, Factors) and error(entry, b["w"], i["w"]) < 1e-5


@pytest.mark.parametrize("rank", [1, 8, 15, 16, 17, 33])
def test_the_rank_is_the_one_asked_for(rank: int) -> None:
    b, i = pairs.pair(torch.float32, changed=1.0, shapes={"w": (128, 96), "e": (3, 80, 96)})
    made = dict(zip(b, (store := LowRankStore(rank=rank)).encode(pairs.sources(b, i))))
    for name, entry in made.items():
        assert isinstance(entry, Factors) and entry.u.shape[-1] == rank == entry.v.shape[-2]
        stack, height, width = (1, *b[name].shape)[-3:]
        assert store.nbytes(entry) == 4 * rank * stack * (height + width)
        for matrix in entry.u.float() @ entry.v.float() if name == "e" else [entry.u @ entry.v]:
            assert int(torch.linalg.matrix_rank(matrix)) == rank
        assert error(entry, b[name], i[name]) == pytest.approx(
            best(b[name], i[name], rank), rel=0.01
        )
    assert f"rank {rank}," in store.describe()


def test_what_a_gpu_is_given_is_padded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pa_fast.stores.lowrank.is_on_cpu", lambda tensor: False)
    b, i = pairs.pair(torch.float32, changed=1.0, shapes={"w": (128, 96), "e": (3, 80, 96)})
    entries = list(LowRankStore(rank=17).encode(pairs.sources(b, i)))
    live = pairs.live_like(b)
    bound = LowRankStore()
    bound.bind(list(live.values()), list(b.values()), entries, [None, None])
    bound.set_(1.0)
    for held, entry, w, base in zip(bound.entries, entries, live.values(), b.values()):
        assert (held.u.shape[-1], held.v.shape[-2], entry.u.shape[-1]) == (32, 32, 17)
        assert torch.allclose(w, base + entry.u @ entry.v, atol=1e-5)
    assert bound.nbytes(entries[0]) * 32 == bound.nbytes(bound.entries[0]) * 17


def test_equal_sides_have_rank_nothing() -> None:
    b, _ = pairs.pair(shapes=SHAPES)
    entry = next(iter(LowRankStore().encode(pairs.sources(b, b))))
    energy = next(iter(LowRankStore(energy=0.9).encode(pairs.sources(b, b))))
    assert all(isinstance(e, (Factors, DenseEntry)) for e in (entry, energy))
    assert isinstance(energy, Factors) and energy.u.shape == (96, 0)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_energy_takes_the_lowest_rank_that_holds_it(share: float) -> None:
    b, i = pairs.pair(torch.float32, changed=1.0, shapes={"w": (256, 320)})
    (entry,) = LowRankStore(energy=share).encode(pairs.sources(b, i))
    assert isinstance(entry, Factors)
    assert error(entry, b["w"], i["w"]) ** 2 <= 1 - share + 1e-3
    # one less would not: up to what the decomposition itself misses
    assert best(b["w"], i["w"], entry.u.shape[1] - 1) ** 2 > 0.99 * (1 - share)


def test_energy_that_costs_more_than_the_whole_keeps_the_whole() -> None:
    b, i = pairs.pair(changed=1.0, shapes={"w": (64, 64)})
    (entry,) = LowRankStore(energy=0.999).encode(pairs.sources(b, i))
    assert isinstance(entry, DenseEntry)


def test_a_budget_is_kept_and_spent_where_it_gains_most() -> None:
    b, i = pairs.pair(changed=1.0, shapes={**SHAPES, "k": (96, 128)})
    i["k"] = (b["k"].float() + 5 * (i["k"].float() - b["k"].float())).bfloat16()
    budget = i["norm"].nbytes + 20_000
    made = dict(zip(b, LowRankStore(budget_bytes=budget).encode(pairs.sources(b, i))))
    ranks = {name: entry.u.shape[-1] for name, entry in made.items() if isinstance(entry, Factors)}
    total = sum(pairs.nbytes(entry) for entry in made.values())
    assert budget - 2 * 3 * 144 < total <= budget  # what is left pays for no further rank
    assert ranks["k"] == max(ranks.values()) and ranks["k"] > ranks["q"]
    with pytest.raises(UsageError, match="take 128"):
        list(LowRankStore(budget_bytes=100).encode(pairs.sources(b, i)))


def test_spend_is_greedy_by_gain_per_byte() -> None:
    gains, costs = [[9.0, 4.0, 1.0], [8.0, 7.0], []], [3, 2, 1]
    assert spend(gains, costs, 0) == [0, 0, 0]
    assert spend(gains, costs, 4) == [0, 2, 0]
    assert spend(gains, costs, 7) == [1, 2, 0]
    assert spend(gains, costs, 100) == [3, 2, 0]


def test_non_finite_matrices_are_held_whole() -> None:
    b, i = pairs.pair(shapes=SHAPES)
    i["q"][0, 0] = float("nan")
    assert isinstance(next(iter(LowRankStore().encode(pairs.sources(b, i)))), DenseEntry)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"rank": 8, "energy": 0.5},
        {"budget_bytes": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        LowRankStore(**options)  # type: ignore[arg-type]

"""Sparse deltas: exact loses nothing for any λ and any dtypes, the others keep what they say, and
bytes are as predicted."""

from __future__ import annotations

import itertools

import pytest
import torch
from pa_kernels import SparseTensor, reference

import pa_fast
from pa_fast.errors import DataError, UsageError
from pa_fast.live.binding import as_integers
from pa_fast.stores.sparse import SparseStore
from pa_fast.stores.store import DenseEntry
from tests.stores import pairs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(("base", "instruct", "live"), list(itertools.product(DTYPES, repeat=3)))
def test_exact_is_dense_for_every_lambda_and_dtype(
    base: torch.dtype, instruct: torch.dtype, live: torch.dtype
) -> None:
    b, i = pairs.pair(base, instruct, changed=0.02)
    if base != instruct:
        # bases that a narrower dtype holds exactly, so that not every weight counts as changed
        b = {
            name: torch.where(
                torch.rand(t.shape, generator=torch.Generator().manual_seed(0)) < 0.1, t, t.round()
            )
            for name, t in b.items()
        }
        i = {
            name: torch.where(b[name] == b[name].round(), b[name].to(instruct), t)
            for name, t in i.items()
        }
    dense, sparse = pairs.live_like(b, live), pairs.live_like(b, live)
    reference_ = pa_fast.LiveWeights.bind(dense, b, i)
    weights = pa_fast.LiveWeights.bind(sparse, b, i, "sparse")
    entries = list(SparseStore().encode(pairs.sources(b, i, live)))
    assert pairs.count(entries)["SparseTensor"] >= 3
    for lam in [*(k / 10 for k in range(-5, 16)), 1 / 3, 0.0]:
        reference_.set_lambda(lam)
        weights.set_lambda(lam)
        for name in b:
            assert torch.equal(as_integers(dense[name]), as_integers(sparse[name])), (name, lam)
        assert weights.checksum() == reference_.checksum() and weights.verify()
        assert weights.effective_lambda() == pytest.approx(
            reference_.effective_lambda(), rel=1e-5, abs=1e-9, nan_ok=True
        )
    assert weights.lossless and weights.exact


@pytest.mark.parametrize("changed", [0.002, 0.03, 0.2, 0.5])
def test_bytes_are_position_and_two_values_times_density(changed: float) -> None:
    shapes = {"w": (600, 1000), "v": (300, 1000)}
    b, i = pairs.pair(changed=changed, shapes=shapes)
    entries = list(SparseStore().encode(pairs.sources(b, i)))
    moved = sum(int((as_integers(b[n]) != as_integers(i[n])).sum()) for n in b)
    numel = sum(t.numel() for t in b.values())
    predicted = min(2 * moved, numel / 8) + 4 * moved
    assert sum(pairs.nbytes(entry) for entry in entries) == pytest.approx(predicted, rel=0.05)


def test_topk_keeps_the_share_per_tensor_and_ties_a_fifth() -> None:
    b, i = pairs.pair(changed=1.0)
    for store, share in ((SparseStore("topk", 0.1), 0.1), (SparseStore("ties"), 0.2)):
        for name, entry in zip(b, store.encode(pairs.sources(b, i))):
            if not isinstance(entry, SparseTensor):
                assert b[name].numel() < 10
                continue
            assert entry.count == round(share * b[name].numel())
            magnitude = (i[name].float() - b[name].float()).abs().view(-1)
            kept = torch.zeros(b[name].numel(), dtype=torch.bool)
            kept[entry.positions()] = True
            assert magnitude[kept].min() >= magnitude[~kept].max()
            assert torch.equal(entry.target, i[name].view(-1)[kept]) and torch.equal(
                entry.base, b[name].view(-1)[kept]
            )


def test_global_topk_spends_where_differences_are_large() -> None:
    b, i = pairs.pair(changed=1.0)
    i["a"] = (b["a"].float() + 100 * (i["a"].float() - b["a"].float())).bfloat16()
    made = dict(zip(b, SparseStore("topk", 0.05, "global").encode(pairs.sources(b, i))))
    counts = {
        n: e.count if isinstance(e, SparseTensor) else int((e.target != b[n]).sum())
        for n, e in made.items()
    }
    assert sum(counts.values()) == round(0.05 * sum(t.numel() for t in b.values()))
    assert counts["a"] > 0.4 * b["a"].numel() and counts["long"] == 0


@pytest.mark.parametrize("live", DTYPES)
def test_dare_rescales_what_it_keeps_and_means_the_same(live: torch.dtype) -> None:
    b, i = pairs.pair(torch.float32, torch.float32, changed=1.0)
    store = SparseStore("dare", 0.25, seed=9)
    entry = dict(zip(b, store.encode(pairs.sources(b, i, live))))["long"]
    assert isinstance(entry, SparseTensor)
    at = entry.positions()
    start, stop = b["long"][at], i["long"][at]
    assert torch.equal(entry.target, (start + (stop - start) / 0.25).to(live))
    assert entry.count == pytest.approx(0.25 * 70_000, rel=0.03)
    kept = (pairs.end(entry, b["long"]).double() - b["long"].double()).mean()
    whole = i["long"].double() - b["long"].double()
    assert abs(kept - whole.mean()) < 5 * float(whole.std()) * (3 / 70_000) ** 0.5 + 1e-3


def test_dare_that_overflows_is_refused_by_name() -> None:
    b = {"w": torch.zeros(1000, dtype=torch.float16)}
    i = {"w": torch.full((1000,), 60000.0, dtype=torch.float16)}
    with pytest.raises(DataError, match=r"`w`: \d+ weights rescaled by 1/0.5 do not fit"):
        list(SparseStore("dare", 0.5).encode(pairs.sources(b, i)))


def test_a_tensor_that_is_smaller_whole_is_held_whole() -> None:
    b, i = pairs.pair(changed=1.0, rel=1.0)
    assert all(isinstance(entry, DenseEntry) for entry in SparseStore().encode(pairs.sources(b, i)))
    made = dict(zip(b, SparseStore("topk", 0.99).encode(pairs.sources(b, i))))
    assert isinstance(made["c"], DenseEntry)
    still = (made["c"].target == b["c"]).sum()
    assert still <= 1 and torch.equal(reference.lerp(b["c"], made["c"].target, 0.0), b["c"])


@pytest.mark.parametrize(
    "options",
    [
        {"select": "best"},
        {"select": "exact", "density": 0.1},
        {"select": "topk"},
        {"select": "topk", "density": 0.0},
        {"select": "dare", "density": 1.5},
        {"select": "ties", "scope": "global"},
        {"select": "topk", "density": 1, "scope": "x"},
        {"select": "dare", "density": 0.5, "seed": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        SparseStore(**options)  # type: ignore[arg-type]
    assert caught.value.hint

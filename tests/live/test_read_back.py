"""The proof of a switch: memory against what was computed, and an independent merge against a
switch that computes something else."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pa_kernels
import pytest
import torch
from pa_kernels import compiled, dense
from pa_kernels.switch import Written

import pa_fast
from pa_fast.base import CompleteWeights
from pa_fast.errors import WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.stores import dense as dense_store
from pa_fast.stores.packed import PackedStore
from pa_fast.sweep.point import MERGED_EVERY
from tests.stores import pairs
from tests.sweep.fakes import FakeEngine, Scorer

STORES = ["dense", "packed", "sparse", "lowrank"]
GRID = (0.0, 0.3, 1.0, 0.75)


def bound(store: str, **options: Any) -> tuple[pa_fast.LiveWeights, pairs.Tensors, pairs.Tensors]:
    base, instruct = pairs.pair()
    live = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    weights = pa_fast.LiveWeights.bind(live, base, instruct, store=store, **options)
    return weights, live, {**{f"b:{n}": t for n, t in base.items()}, **instruct}


def flip(tensor: torch.Tensor, at: int, bit: int) -> None:
    """Flip a bit of memory, as failing hardware does: torch counts no write."""
    as_integers(tensor).numpy()[at] ^= 1 << bit if bit < 15 else -(1 << 15)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bit", [0, 15])
def test_a_bit_that_flips_after_the_switch_is_named(store: str, bit: int) -> None:
    weights, live, _ = bound(store)
    for lam in GRID:
        weights.set_lambda(lam)
        assert weights.read_back() == weights.checksum()
        for name, at in (("a", 4_000), ("long", 69_999), ("c", 0)):
            before = live[name].clone()
            flip(live[name], at, bit)
            with pytest.raises(WeightsError, match=f"live tensor `{name}` does not hold the merge"):
                weights.read_back()
            live[name].detach().copy_(before)
        flip(live["a"], 0, bit)
        flip(live["long"], 0, bit)  # the same bit in two tensors
        with pytest.raises(WeightsError, match="`a` and 1 more"):
            weights.read_back()
        weights.resync()
        assert weights.read_back(merge_again=True)


@pytest.mark.parametrize("store", ["dense", "packed", "sparse"])
def test_a_switch_is_proven_by_one_read_of_memory(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _, _ = bound(store)
    weights.set_lambda(0.3)

    def refused(*_: Any) -> Any:
        raise AssertionError("merged again")

    monkeypatch.setattr(type(weights._open()), "merged_together", refused)
    weights.read_back()
    with pytest.raises(AssertionError, match="merged again"):
        weights.read_back(merge_again=True)


def test_before_the_first_switch_and_of_a_store_that_records_nothing_weights_are_merged() -> None:
    for store in STORES:
        weights, live, _ = bound(store)
        weights.read_back()
        flip(live["b"], 17, 3)
        with pytest.raises(WeightsError, match="`b`"):
            weights.read_back()


def test_a_failed_switch_has_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _, _ = bound("dense")
    weights.set_lambda(0.3)

    def failing(self: Any, lam: float) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(pa_kernels.Lerp, "run_", failing)
        with pytest.raises(RuntimeError, match="the device is gone"):
            weights.set_lambda(0.4)
    with pytest.raises(WeightsError, match="no λ is set"):
        weights.read_back()
    weights.set_lambda(0.4)
    weights.read_back(merge_again=True)


# --- a kernel that computes something else


@pytest.fixture
def wrong_bit(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The recorded switch writes one wrong bit at the λ of the list, and sums what it wrote."""
    lams: list[float] = []
    right = dense._write_recorded_

    def write(row: Any, piece: slice, lam: float) -> tuple[int, float]:
        recorded = right(row, piece, lam)
        if round(lam, 6) not in lams or row.out.numel() < 70_000:
            return recorded
        flip(row.out, 123, 0)
        return dense.piece_checksum(row.out[piece], 0), recorded[1]

    monkeypatch.setattr(dense, "_write_recorded_", write)
    yield lams


class Engine(FakeEngine):
    """A fake model on real weights."""

    def __init__(self, weights: pa_fast.LiveWeights):
        super().__init__()
        self.weights = weights  # type: ignore[assignment]


def test_the_independent_merge_finds_a_switch_that_computes_something_else(
    wrong_bit: list[float],
) -> None:
    weights, _, _ = bound("dense")
    wrong_bit.append(0.3)
    weights.set_lambda(0.3)
    weights.read_back()  # memory holds what was computed
    with pytest.raises(WeightsError, match="`long` does not hold the merge"):
        weights.read_back(merge_again=True)


def test_a_sweep_merges_the_first_lambda_again_and_every_16th(
    wrong_bit: list[float], tmp_path: pathlib.Path
) -> None:
    grid = [k / 64 for k in range(1, MERGED_EVERY + 5)]
    wrong_bit += [grid[0], grid[3], grid[MERGED_EVERY]]
    weights, _, _ = bound("dense")
    result = pa_fast.sweep(Engine(weights), grid, [Scorer("norm")], tmp_path / "run", figure=False)
    failed = {float(failure.lam): failure.error for failure in result.failures}
    # memory holds at the 4th λ what the switch computed: only an independent merge can tell
    assert failed.keys() == {grid[0], grid[MERGED_EVERY]}
    assert all("`long` does not hold the merge" in str(error) for error in failed.values())


def test_weights_of_others_are_verified_at_every_lambda() -> None:
    """The body that `complete` adds: weights that know no sums are merged again each time."""
    calls: list[str] = []

    class Weights:
        lam = 0.5

        def verify(self) -> bool:
            calls.append("verify")
            return len(calls) < 3

        def checksum(self) -> int:
            calls.append("checksum")
            return 7

    assert CompleteWeights.read_back(Weights()) == 7  # type: ignore[arg-type]
    assert calls == ["verify", "checksum"]
    with pytest.raises(WeightsError, match=r"live weights at λ = 0\.5 differ from a fresh merge"):
        CompleteWeights.read_back(Weights())  # type: ignore[arg-type]


# --- packed weights on a GPU, whose switch does not wait for what it found


def test_what_a_packed_switch_found_is_said_by_the_next_question() -> None:
    for asked in ("read_back", "verify", "checksum"):
        weights, live, _ = bound("packed")
        (store,) = (s for s, _ in weights._open()._parts if isinstance(s, PackedStore))
        store._is_on_cpu = False
        weights.set_lambda(0.3)
        expected = weights.checksum()
        flip(live["a"], 17, 2)
        weights.set_lambda(0.6)  # starts from the wrong bit, and returns
        if asked == "checksum":
            weights.checksum()
        else:
            with pytest.raises(WeightsError, match="`a` does not hold the merge"):
                getattr(weights, asked)()
        weights.set_lambda(0.3)  # written anew
        assert weights.read_back(merge_again=True) == expected


# --- what was written


@pytest.mark.parametrize("store", ["dense", "packed", "sparse"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_store_says_what_it_wrote(
    store: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = compiled.loops() if is_compiled else None
    if is_compiled and loops is None:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(compiled, "_ready", [] if loops is None else [loops])
    weights, live, sides = bound(store)
    for lam in (*GRID, -0.4 if store != "packed" else 0.1):
        weights.set_lambda(lam)
        written = weights._written_by(weights._open())
        for binding, one in zip(weights._floats, written):
            assert isinstance(one, Written)
            w, b, i = (
                t.double()
                for t in (live[binding.name], sides[f"b:{binding.name}"], sides[binding.name])
            )
            assert one.checksum == pa_kernels.reference.checksum(live[binding.name])
            if one.products is not None:
                expected = float(((w - b) * (i - b)).sum()), float((i - b).square().sum())
                assert one.products == pytest.approx(expected, 1e-5, 1e-9)
        whole = weights.effective_lambda()
        weights._is_recorded = False  # by a pass over live tensors and sources
        weights._recorded = None
        assert whole == pytest.approx(weights.effective_lambda(), 1e-6, 1e-9)


def test_many_small_tensors_are_merged_again_together(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {f"expert.{k}": torch.randn(40, 3).bfloat16() for k in range(500)}
    instruct = {name: (tensor * 1.01).bfloat16() for name, tensor in base.items()}
    live = {name: torch.empty(tensor.shape, dtype=torch.bfloat16) for name, tensor in base.items()}
    calls: list[int] = []
    plain = dense_store.merged

    def merged(base: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(base.numel())
        return plain(base, *rest)

    monkeypatch.setattr(dense_store, "merged", merged)
    weights = pa_fast.LiveWeights.bind(live, base, instruct)
    for lam in (0.3, 0.0, 1.0):
        weights.set_lambda(lam)
        assert weights.verify()
    assert calls == [500 * 120] * 3
    flip(live["expert.77"], 5, 0)
    flip(live["expert.499"], 119, 15)
    assert weights.changed() == ["expert.77", "expert.499"]

"""What else may write to live weights: every store writes the merge all the same, or says once that
it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pa_fast
from pa_fast.delta.sparse_store import SparseStore
from pa_fast.errors import WeightsError


def counted(w: torch.Tensor) -> None:
    w.zero_()


def past_the_count(w: torch.Tensor) -> None:
    w.data.zero_()


def through_numpy(w: torch.Tensor) -> None:
    w.view(torch.int16).numpy()[7] ^= 1


def last_element(w: torch.Tensor) -> None:
    w.view(torch.int16).numpy()[-1] ^= 1


def exchanged_rows(w: torch.Tensor) -> None:
    rows = w.view(torch.int16).numpy()[: 2 * 4096].reshape(2, 4096)
    rows[:] = rows[::-1].copy()


def reversed_in_place(w: torch.Tensor) -> None:
    w[:64] = w[:64].flip(0)  # within one row of the sum, where torch's count is what tells


WRITES = [counted, past_the_count, through_numpy, last_element, exchanged_rows, reversed_in_place]
STORES = [
    "dense",
    "packed",
    "sparse",
    SparseStore("topk", 0.3),
    SparseStore("topk", 0.01),
    "lowrank",
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("size", [9_001, 64 * 512])
def test_the_next_switch_writes_the_merge_whatever_came_before(
    store: str | SparseStore, write: Callable[[torch.Tensor], None], size: int
) -> None:
    g = torch.Generator().manual_seed(1)
    # an odd offset: no row of the sum begins where one of memory does
    live = {
        "w": torch.empty(size + 1, dtype=torch.bfloat16)[1:],
        "z": torch.empty(3, dtype=torch.bfloat16),
    }
    base = {name: torch.randn(t.shape, generator=g).bfloat16() for name, t in live.items()}
    moved = torch.rand(size, generator=g) < 0.02
    instruct = {**base, "w": torch.where(moved, base["w"] * 1.07, base["w"])}
    with pa_fast.LiveWeights.bind(live, base, instruct, store=store) as weights:  # type: ignore[arg-type]
        weights.set_lambda(0.7)
        expected = live["w"].clone()
        if store in ("dense", "packed", "sparse"):
            assert torch.equal(expected, torch.lerp(base["w"], instruct["w"], 0.7))
        weights.set_lambda(0.2)
        write(live["w"])
        try:
            weights.set_lambda(0.7)
        except WeightsError as error:
            assert store == "packed"
            assert "`w`" in error.message
            weights.set_lambda(0.7)
        assert torch.equal(live["w"], expected)
        assert weights.verify()


def test_attached_weights_that_follow_no_lambda_are_written_anew_too() -> None:
    live = {"w": torch.empty(5_000, dtype=torch.float32)}
    base = {"w": torch.randn(5_000)}
    with pa_fast.LiveWeights.bind(live, base, dict(base), store="sparse") as weights:
        # not one position
        live["w"].data.zero_()
        weights.set_lambda(0.5)
        assert torch.equal(live["w"], base["w"])


@pytest.mark.parametrize("change", ["t_", "view", "narrow"])
def test_another_form_at_the_same_address_is_noticed(change: str) -> None:
    live = {"w": torch.empty(30, 100, dtype=torch.bfloat16)}
    base = {"w": torch.randn(30, 100).bfloat16()}
    with pa_fast.LiveWeights.bind(live, base, {"w": base["w"] * 1.01}) as weights:
        if change == "t_":
            live["w"].t_()
        else:
            live["w"].data = (
                live["w"].data.view(torch.float16) if change == "view" else live["w"].data[:10]
            )
        for ask in (weights.verify, weights.checksum, lambda: weights.set_lambda(0.5)):
            with pytest.raises(WeightsError, match="live tensor `w` was bound as"):
                ask()

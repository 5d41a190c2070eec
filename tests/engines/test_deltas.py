"""Delta files of whole models: encoded from two folders, opened beside base alone, with the weights
of the pair."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.engines.encoding import encode
from pa_fast.errors import DataError, PairError, UsageError
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.sparse import SparseStore
from tests.engines.architectures import write_model, write_pair
from tests.engines.test_architectures import assert_same_bits
from tests.engines.test_loading import edit


@pytest.mark.parametrize("architecture", ["qwen2", "mixtral", "phi-3"])
def test_base_and_delta_give_what_the_pair_gives(architecture: str, tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, architecture)
    encode(base, instruct, tmp_path / "delta")
    pair = pa_fast.load(base, instruct)
    lm = pa_fast.load(base, delta=tmp_path / "delta")
    for lam in (0.0, 0.3, 1.0, 1.5):
        pair.set_lambda(lam)
        lm.set_lambda(lam)
        assert_same_bits(lm.model.state_dict(), pair.model.state_dict())
        assert lm.weights.checksum() == pair.weights.checksum() and lm.weights.verify()
    assert lm.identity["store"] == "sparse exact" and lm.identity["instruct"].startswith("delta ")
    assert lm.identity["base"] == pair.identity["base"] and json.dumps(dict(lm.identity))


@pytest.mark.parametrize("tied", ["base", "instruct"])
def test_a_head_that_is_tied_on_one_side_gets_storage_of_its_own(
    tied: str, tmp_path: pathlib.Path
) -> None:
    for side, seed in (("base", 1), ("instruct", 2)):
        write_model(tmp_path / side, "llama", seed, tie_word_embeddings=side == tied)
    encode(tmp_path / "base", tmp_path / "instruct", tmp_path / "delta")
    pair = pa_fast.load(tmp_path / "base", tmp_path / "instruct")
    lm = pa_fast.load(tmp_path / "base", delta=tmp_path / "delta")
    for lam in (0.3, 1.0):
        pair.set_lambda(lam)
        lm.set_lambda(lam)
        assert_same_bits(lm.model.state_dict(), pair.model.state_dict())


@pytest.mark.parametrize(("base", "instruct"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_sides_of_different_dtypes_keep_the_live_dtype(
    base: str, instruct: str, tmp_path: pathlib.Path
) -> None:
    write_model(tmp_path / "base", "llama", 1, dtype=base)
    write_model(tmp_path / "instruct", "llama", 2, dtype=instruct)
    encode(tmp_path / "base", tmp_path / "instruct", tmp_path / "delta")
    pair = pa_fast.load(tmp_path / "base", tmp_path / "instruct")
    lm = pa_fast.load(tmp_path / "base", delta=tmp_path / "delta")
    for one in (pair, lm):
        one.set_lambda(0.3)
    assert_same_bits(lm.model.state_dict(), pair.model.state_dict())


def test_files_of_mixed_dtypes_round_as_the_pair_does(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "mixtral")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" in name or "gate" in name:
                tensors[name] = tensors[name].float() * 1.001

    edit(instruct, widen)
    encode(base, instruct, tmp_path / "delta")
    pair, lm = pa_fast.load(base, instruct), pa_fast.load(base, delta=tmp_path / "delta")
    for one in (pair, lm):
        one.set_lambda(0.3)
    assert_same_bits(lm.model.state_dict(), pair.model.state_dict())


@pytest.mark.parametrize("store", [SparseStore("dare", 0.5), LowRankStore(rank=16)])
def test_lossy_deltas_say_so_and_restore_base(
    store: SparseStore | LowRankStore, tmp_path: pathlib.Path
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    encode(base, instruct, tmp_path / "delta", store)
    bound, opened = (
        pa_fast.load(base, instruct, store=store),
        pa_fast.load(base, delta=tmp_path / "delta"),
    )
    for lm in (bound, opened):
        assert any(
            "not the instruct model" in note and store.describe() in note for note in lm.notes
        )
        assert lm.identity["store"] == store.describe()
        lm.set_lambda(0.7)
    assert_same_bits(bound.model.state_dict(), opened.model.state_dict())
    dense = pa_fast.load(base, instruct)
    for lm in (bound, opened, dense):
        lm.set_lambda(0)
    assert bound.weights.checksum() == opened.weights.checksum() == dense.weights.checksum()


def test_another_base_is_refused(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    encode(base, instruct, tmp_path / "delta")
    with pytest.raises(PairError, match="encoded from a base of content"):
        pa_fast.load(instruct, delta=tmp_path / "delta")
    write_model(tmp_path / "other", "mistral", 1, hidden_size=32, num_attention_heads=2)
    with pytest.raises(PairError, match=r"the delta .* is for"):
        pa_fast.load(tmp_path / "other", delta=tmp_path / "delta")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "neither an instruct model nor a delta file"),
        ({"instruct": "x", "delta": "y"}, "instruct model x and the delta file y are given"),
        ({"delta": "y", "store": "sparse"}, "by itself how it is held"),
        ({"delta": "y", "dtype": "float16"}, "by itself how it is held"),
    ],
)
def test_sides_that_contradict_each_other_are_wrong_usage(
    options: dict[str, str], said: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UsageError, match=said):
        pa_fast.load(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [lambda file: os.truncate(file, 5000), lambda file: os.utime(file, ns=(1, 1))]
)
def test_a_delta_that_changes_after_loading_is_noticed_and_not_a_crash(
    tmp_path: pathlib.Path, change: Callable[[pathlib.Path], None]
) -> None:
    base, instruct = write_pair(tmp_path, "llama")
    encode(base, instruct, tmp_path / "delta")
    lm = pa_fast.load(base, delta=tmp_path / "delta")
    lm.set_lambda(0.3)
    change(tmp_path / "delta")
    for reads in (lambda: lm.set_lambda(0.6), lm.weights.verify, lm.weights.effective_lambda):
        with pytest.raises(DataError, match="delta: the file changed while it was read"):
            reads()
    assert lm.lam == 0.3, "nothing was written"
    lm.close()


def test_a_delta_that_is_replaced_while_it_loads_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pa_fast.engines import loading

    base, instruct = write_pair(tmp_path, "llama")
    encode(base, instruct, tmp_path / "delta")
    encode(base, base, tmp_path / "other")
    plain = loading.load_pair

    def replacing(*args: Any, **kwargs: Any) -> Any:
        os.replace(tmp_path / "other", tmp_path / "delta")
        return plain(*args, **kwargs)

    monkeypatch.setattr("pa_fast.engines.sources.load_pair", replacing)
    with pytest.raises(DataError, match="delta: the file was replaced while it was read"):
        pa_fast.load(base, delta=tmp_path / "delta")

"""The packed store: what is packed and what is held whole, and live weights that are switched from what they hold."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_kernels import PackedTensor, reference
from pa_kernels.packed_tensor import packed_bytes

import pa_fast
from pa_fast.delta import packed_store
from pa_fast.delta.entry import Source, Whole
from pa_fast.delta.packed_store import PackedStore
from pa_fast.errors import DataError, UsageError, WeightsError
from pa_fast.live.binding import as_integers
from tests.delta import pairs

SHAPES = {"many": (300, 129), "long": (70_000,), "few": (9,)}
Bound = tuple[pa_fast.LiveWeights, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture
def bound() -> Bound:
    base, instruct = pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES)
    live = pairs.live_like(base)
    return pa_fast.LiveWeights.bind(live, base, instruct, "packed"), live, base, instruct


def assert_holds(bound: Bound, lam: float) -> None:
    _, live, base, instruct = bound
    for name, tensor in live.items():
        expected = reference.lerp(base[name], instruct[name], lam)
        assert torch.equal(as_integers(tensor), as_integers(expected)), name


def encoded(base: torch.Tensor, instruct: torch.Tensor, live: torch.dtype, via: torch.dtype | None = None) -> object:
    return next(PackedStore().encode([Source("t", base, instruct, live, torch.device("cpu"), via)]))


def test_only_what_the_live_dtype_holds_is_packed() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    base, instruct = (side["long"] for side in pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES))
    fine = base.float() * (1 + 2**-12)
    for b, i, live, via, kind in (
        (base, instruct, bf16, None, PackedTensor),
        (base.float(), instruct, bf16, None, PackedTensor),
        (base.float(), instruct, bf16, bf16, PackedTensor),
        (fine, instruct, bf16, None, Whole),
        (base, instruct, fp32, None, Whole),
        (base, instruct, fp32, bf16, Whole),
        (base, instruct, bf16, fp16, Whole),
        (base, -instruct, bf16, None, Whole),
        (base[:9].clone(), instruct[:9].clone(), bf16, None, Whole),
    ):
        assert isinstance(encoded(b, i, live, via), kind), (b.dtype, live, via)


def test_an_fp32_base_on_the_live_grid_follows_the_contract_of_its_own_dtypes() -> None:
    base, instruct = pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES)
    wide = {name: tensor.float() for name, tensor in base.items()}
    live = pairs.live_like(instruct)
    weights = pa_fast.LiveWeights.bind(live, wide, instruct, "packed")
    for lam in (0.3, 1.0, 0.05):
        weights.set_lambda(lam)
        assert_holds((weights, live, wide, instruct), lam)
        assert weights.verify()


def test_nothing_of_either_side_is_kept_and_bytes_say_so(bound: Bound) -> None:
    weights, live, base, instruct = bound
    memory = weights.memory()
    assert memory.live_bytes == sum(t.nbytes for t in live.values())
    made = [PackedTensor.encode(base[n], instruct[n]) for n in ("many", "long")]
    packed = sum(packed_bytes(e.numel, e.count, e.width) for e in made if e is not None)
    assert memory.host_bytes == packed + 4 * 9
    assert memory.total_bytes < 3.6 * sum(t.numel() for t in live.values())
    copies = {name: tensor.clone() for name, tensor in base.items()}
    ends = {name: tensor.clone() for name, tensor in instruct.items()}
    base.clear(), instruct.clear()
    gc.collect()
    weights.set_lambda(0.7)
    assert_holds((weights, live, copies, ends), 0.7)
    assert weights.verify() and weights.effective_lambda() == pytest.approx(0.7, abs=0.02)
    live["many"][3, 7] += 1
    assert weights.changed() == ["many"]


def test_a_lambda_outside_the_range_is_refused_before_anything_is_written(bound: Bound) -> None:
    weights = bound[0]
    weights.set_lambda(0.25)
    for lam in (-0.01, 1.01):
        with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
            weights.set_lambda(lam)
    assert weights.lam == 0.25 and weights.verify()
    assert_holds(bound, 0.25)


def test_a_foreign_write_is_found_by_the_next_switch_which_names_it(bound: Bound) -> None:
    weights, live, *_ = bound
    weights.set_lambda(0.4)
    live["long"][5] += 1
    with pytest.raises(WeightsError, match="`long` did not hold") as caught:
        weights.set_lambda(0.5)
    assert "resync" in str(caught.value) and weights.lam is None
    weights.set_lambda(0.5)
    assert_holds(bound, 0.5)
    live["many"].zero_()
    weights.resync()
    assert weights.lam == 0.5 and weights.verify()
    assert_holds(bound, 0.5)


def test_without_a_base_stale_weights_stay_refused_until_the_right_one_is_given(bound: Bound) -> None:
    weights, live, base, instruct = bound
    right = {name: tensor.clone() for name, tensor in base.items()}
    weights.set_lambda(0.4)
    base.clear()
    gc.collect()
    live["long"][5] += 1
    with pytest.raises(WeightsError, match="`long` did not hold"):
        weights.set_lambda(0.5)
    for _ in range(2):
        with pytest.raises(WeightsError, match="their base is gone"):
            weights.set_lambda(0.5)
    with pytest.raises(WeightsError, match="not the base"):
        weights.resync(instruct)
    with pytest.raises(WeightsError, match="`many` is"):
        weights.resync({**right, "many": right["many"][:5]})
    weights.resync(right)
    weights.set_lambda(0.5)
    assert_holds((weights, live, right, instruct), 0.5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_switch_that_does_not_finish_leaves_no_lambda_and_the_next_one_starts_anew(
    bound: Bound, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pa_kernels import packed

    weights = bound[0]
    weights.set_lambda(0.4)
    switch = packed.switch_piece_

    def fail(live: torch.Tensor, *rest: Any) -> None:
        if live.numel() == bound[1]["long"].numel():
            raise error
        switch(live, *rest)

    monkeypatch.setattr(packed, "switch_piece_", fail)
    with pytest.raises(error):
        weights.set_lambda(0.9)
    assert weights.lam is None
    monkeypatch.undo()
    weights.set_lambda(0.9)
    assert_holds(bound, 0.9)


def test_codes_that_do_not_give_back_their_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct = (side["long"] for side in pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES))
    made = PackedTensor.encode(base, instruct)
    assert made is not None
    parity = made.codes.clone()
    parity[1234] ^= 1  # of a code of 8 bits in the lower half of its word
    wrong = PackedTensor(made.dtype, made.numel, made.width, parity, made.starts, made.where, made.base, made.target, made.span)
    monkeypatch.setattr(packed_store.PackedTensor, "encode", lambda *args: wrong)
    with pytest.raises(DataError, match="`t`: its codes do not give back"):
        encoded(base, instruct, torch.bfloat16)


def test_a_model_reads_its_base_again_from_its_files(tmp_path: pathlib.Path) -> None:
    from tests.engines.architectures import write_pair
    from tests.engines.test_loading import edit
    from tests.test_conformance import stepped

    base, instruct = write_pair(tmp_path, "mixtral")  # its experts are converted, so that no map of a file holds them
    kept: dict[str, torch.Tensor] = {}
    edit(base, lambda tensors: kept.update(tensors))
    edit(instruct, lambda tensors: tensors.update({n: stepped(kept[n], 0.02) for n in tensors}))
    lm = pa_fast.load(base, instruct, store="packed")
    lm.set_lambda(0.5)
    before = lm.weights.checksum()
    name, expert = next((n, p) for n, p in lm.model.named_parameters() if "experts" in n)
    with torch.no_grad():
        expert.view(-1)[0] += 1
    with pytest.raises(WeightsError, match=name):
        lm.set_lambda(0.6)
    lm.set_lambda(0.5)
    assert lm.weights.checksum() == before
    with torch.no_grad():
        expert.zero_()
    lm.resync()
    assert lm.lam == 0.5 and lm.weights.checksum() == before


def test_wrong_ranges_are_wrong_usage() -> None:
    for lo, hi in ((0.1, 1.0), (0.0, 0.9), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(UsageError, match="range"):
            PackedStore(lo, hi)


def forged(part: str, change: Callable[[torch.Tensor], torch.Tensor], folder: pathlib.Path) -> pathlib.Path:
    from tests.attacks.test_hostile_deltas import Forged

    base, instruct = pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES)
    file = Forged.of(pairs.saved(folder / "delta", base, instruct, PackedStore()))
    file.parts[f"long::{part}"] = change(file.parts[f"long::{part}"])
    file.agree("long")
    file.save(folder / "delta")
    return folder / "delta"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("codes", lambda t: t ^ 0x0202),
        ("codes", lambda t: t[:-1]),
        ("starts", lambda t: t + 100_000_000),
        ("starts", lambda t: t.flip(0)),
        ("where", lambda t: torch.full_like(t.int(), 65535).to(t.dtype)),
        ("base", lambda t: -t),
        ("target", lambda t: t[:-1]),
        ("span", lambda t: torch.tensor([0.5, 1.0])),
        ("span", lambda t: torch.tensor([float("nan"), 1.0])),
        ("span", lambda t: t.double()),
    ],
)
def test_forged_files_are_refused_by_name(
    part: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: pathlib.Path
) -> None:
    base, _ = pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES)
    with pytest.raises((pa_fast.PaFastError), match="long"):
        pairs.opened(forged(part, change, tmp_path), base)

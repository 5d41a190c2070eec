"""The packed store: what is packed and what is held whole, and live weights that are switched from
what they hold."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_kernels import PackedTensor, reference
from pa_kernels.packed import packed_bytes

import pa_fast
from pa_fast.errors import CheckpointError, DataError, UsageError, WeightsError
from pa_fast.live.binding import as_integers
from pa_fast.stores import packed as packed_store
from pa_fast.stores.packed import PackedStore
from pa_fast.stores.store import DenseEntry, Source
from tests.kernels.pairs import at_powers_of_two
from tests.stores import pairs

SHAPES = {"many": (300, 129), "long": (70_000,), "few": (9,)}
Bound = tuple[
    pa_fast.LiveWeights, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]
]


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


def encoded(
    base: torch.Tensor, instruct: torch.Tensor, live: torch.dtype, via: torch.dtype | None = None
) -> object:
    return next(PackedStore().encode([Source("t", base, instruct, live, torch.device("cpu"), via)]))


def test_only_what_the_live_dtype_holds_is_packed() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    base, instruct = (side["long"] for side in pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES))
    fine = base.float() * (1 + 2**-12)
    for b, i, live, via, kind in (
        (base, instruct, bf16, None, PackedTensor),
        (base.float(), instruct, bf16, None, PackedTensor),
        (base.float(), instruct, bf16, bf16, PackedTensor),
        (fine, instruct, bf16, None, DenseEntry),
        (base, instruct, fp32, None, DenseEntry),
        (base, instruct, fp32, bf16, DenseEntry),
        (base, instruct, bf16, fp16, DenseEntry),
        (base, -instruct, bf16, None, DenseEntry),
        (base[:9].clone(), instruct[:9].clone(), bf16, None, DenseEntry),
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


def test_without_a_base_stale_weights_stay_refused_until_the_right_one_is_given(
    bound: Bound,
) -> None:
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
    from pa_kernels.packed import cpu

    weights = bound[0]
    weights.set_lambda(0.4)
    switch = cpu.switch_piece_

    def fail(live: torch.Tensor, *rest: Any) -> None:
        if live.numel() == bound[1]["long"].numel():
            raise error
        switch(live, *rest)

    monkeypatch.setattr(cpu, "switch_piece_", fail)
    with pytest.raises(error):
        weights.set_lambda(0.9)
    assert weights.lam is None
    monkeypatch.undo()
    weights.set_lambda(0.9)
    assert_holds(bound, 0.9)


def test_codes_that_do_not_give_back_their_sources_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, instruct = (side["long"] for side in pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES))
    made = PackedTensor.encode(base, instruct)
    assert made is not None
    parity = made.codes.clone()
    parity[1234] ^= 1  # of a code of 8 bits in the lower half of its word
    wrong = PackedTensor(
        made.dtype,
        made.numel,
        made.width,
        parity,
        made.starts,
        made.where,
        made.base,
        made.target,
        made.span,
    )
    monkeypatch.setattr(packed_store.PackedTensor, "encode", lambda *args, **options: wrong)
    with pytest.raises(DataError, match="`t`: its codes do not give back"):
        encoded(base, instruct, torch.bfloat16)


WIDE = PackedStore(-0.2, 1.5)


def near_the_smallest_normal_number(dtype: torch.dtype) -> tuple[pairs.Tensors, pairs.Tensors]:
    b, i = at_powers_of_two(dtype, 12, range(1, 2))
    return {"long": torch.cat([b, b.new_ones(9000)])}, {"long": torch.cat([i, i.new_ones(9000)])}


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The encoder of earlier versions, which looked at merges after they were rounded alone."""
    monkeypatch.setattr(
        "pa_kernels.packed.codes._merge", lambda b, i, lam: reference.lerp(b, i, lam).float()
    )
    return monkeypatch


@pytest.mark.parametrize("few", [-1, 1 << 40], ids=["by tables", "one by one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_near_the_smallest_normal_number_follow_a_wider_range_when_their_base_is_gone(
    dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pa_kernels.packed.cpu.FEW", few)
    base, instruct = near_the_smallest_normal_number(dtype)
    copies = {name: tensor.clone() for name, tensor in base.items()}
    live = pairs.live_like(base)
    weights = pa_fast.LiveWeights.bind(live, base, instruct, WIDE)
    base.clear()
    gc.collect()
    for lam in (-0.2, 1.5, 0.5, -0.19, 1.49, -0.2):
        weights.set_lambda(lam)
        assert_holds((weights, live, copies, instruct), lam)
        assert weights.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_file_of_an_earlier_version_whose_codes_do_not_hold_is_refused_by_name(
    dtype: torch.dtype, earlier: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    base, instruct = near_the_smallest_normal_number(dtype)
    path = pairs.saved(tmp_path / "delta", base, instruct, WIDE)
    earlier.undo()
    with pytest.raises(
        CheckpointError, match=r"delta: `long`: the code of weight \d+ .* every λ in \[-0.2, 1.5\]"
    ) as caught:
        pairs.opened(path, base)
    assert "encode the delta again" in str(caught.value)


@pytest.mark.parametrize("store", [PackedStore(), WIDE], ids=lambda store: store.describe())
def test_a_file_of_an_earlier_version_whose_codes_hold_is_opened(
    store: PackedStore, earlier: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    base, instruct = pairs.pair(changed=1.0, rel=0.02, shapes=SHAPES)
    if store is not WIDE:
        base, instruct = (
            {**a, **b}
            for a, b in zip((base, instruct), near_the_smallest_normal_number(torch.bfloat16))
        )
    path = pairs.saved(tmp_path / "delta", base, instruct, store)
    earlier.undo()
    weights, live = pairs.opened(path, base)
    for lam in (store.lo, 0.4, store.hi):
        weights.set_lambda(lam)
        assert_holds((weights, live, base, instruct), lam)


def test_both_ends_of_a_wider_range_are_proven(earlier: pytest.MonkeyPatch) -> None:
    earlier.setattr("pa_kernels.packed.cpu.FEW", -1)
    base, instruct = near_the_smallest_normal_number(torch.float16)
    for lo, hi, lam in ((-0.2, 1.0, "-0.2"), (0.0, 1.5, "1.5")):
        with pytest.raises(
            DataError, match=f"`long`: its codes do not give back the weights at λ = {lam}"
        ):
            list(PackedStore(lo, hi).encode(pairs.sources(base, instruct)))


def test_a_model_reads_its_base_again_from_its_files(tmp_path: pathlib.Path) -> None:
    from tests.engines.architectures import write_pair
    from tests.engines.test_loading import edit
    from tests.test_conformance import stepped

    # its experts are converted, so that no map of a file holds them
    base, instruct = write_pair(tmp_path, "mixtral")
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


def forged(
    part: str, change: Callable[[torch.Tensor], torch.Tensor], folder: pathlib.Path
) -> pathlib.Path:
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
        ("codes", lambda t: t ^ 0x0101),
        ("codes", lambda t: t[:-1]),
        ("starts", lambda t: t + 100_000_000),
        ("starts", lambda t: t.flip(0)),
        ("where", lambda t: torch.full_like(t.int(), 65535).to(t.dtype)),
        ("base", lambda t: -t),
        ("target", lambda t: t[:-1]),
        ("span", lambda t: torch.tensor([0.5, 1.0])),
        ("span", lambda t: torch.tensor([-1.0, 3.0])),
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

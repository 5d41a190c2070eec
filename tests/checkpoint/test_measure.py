"""What `inspect --sample` and `--full` say of the weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_kernels import reference

import pa_fast.checkpoint.measure as measure
from pa_fast.base import Lambda
from pa_fast.checkpoint.inspect import inspect
from pa_fast.checkpoint.merge import merge
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import DataError, UsageError
from pa_fast.stores import registry
from pa_fast.stores.dense import DenseStore
from tests.checkpoint.pairs import write_checkpoint, write_pair
from tests.stores import pairs

LAMBDAS = ("0", "0.05", "1/3", "1")


def layered(root: Path, layers: int = 3, size: int = 4000) -> tuple[Path, Path]:
    """A pair whose delta grows by layer, with experts, a norm that is equal and integers."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {
        "ids": torch.arange(3),
        "model.norm.weight": torch.ones(16).bfloat16(),
    }
    for layer in range(layers):
        for name in ("mlp.experts.0.w1", "mlp.experts.1.w1", "self_attn.q_proj"):
            base[f"model.layers.{layer}.{name}.weight"] = torch.randn(
                size, generator=generator
            ).bfloat16()
    instruct = {
        name: (
            (
                value.float()
                + 0.01 * (int(name.split(".")[2]) + 1) * torch.randn(size, generator=generator)
            ).bfloat16()
            if ".layers." in name
            else value
        )
        for name, value in base.items()
    }
    return write_checkpoint(root / "base", base, shards=2), write_checkpoint(
        root / "instruct", instruct
    )


def test_all_weights(tmp_path: Path) -> None:
    pair = layered(tmp_path)
    report = inspect(*pair, full=True, fidelity=LAMBDAS)
    found = report.measured
    assert found and not found.is_sampled
    modules = {part.name: part for part in found.modules}
    parameters = {
        "model.layers.mlp.experts.*.w1": 24_000,
        "model.layers.self_attn.q_proj": 12_000,
        "model.norm": 16,
    }
    assert {
        name: part.parameters for name, part in modules.items()
    } == parameters and found.total.parameters == 36_016
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as instruct:
        names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
        b, i = (torch.cat([side.tensor(name) for name in names]) for side in (base, instruct))
    queries = modules["model.layers.self_attn.q_proj"]
    norm = (i.double() - b.double()).norm() / b.double().norm()
    assert queries.relative_norm == pytest.approx(float(norm), rel=1e-4)
    assert queries.unchanged == int((b == i).sum()) / 12_000
    for lam, said in zip(LAMBDAS, queries.fidelity):
        w, delta = (
            reference.lerp(b, i, float(Lambda(lam))).double() - b.double(),
            i.double() - b.double(),
        )
        assert said.lam == lam and said.effective_lambda == pytest.approx(
            float(w @ delta / (delta @ delta)), rel=1e-3, abs=1e-9
        )
        assert said.moved == int((w != 0).sum()) / 12_000
        assert said.intended_lambda == float(Lambda(lam))
    norms = {part.name: part.relative_norm for part in found.tensors}
    assert norms[names[0]] < norms[names[1]] < norms[names[2]], "tensors have their own figures"
    assert modules["model.norm"].fidelity[1].effective_lambda is None, (
        "nothing differs, so no λ is any other"
    )
    assert (
        found.total.stores.dense == 4 * 36_016
        and found.total.stores.packed < found.total.stores.dense
    )
    assert json.loads(report.to_json())["measured"]["total"]["fidelity"][2]["lam"] == "1/3"


@pytest.mark.parametrize(
    ("base", "instruct"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")],
)
@pytest.mark.parametrize("share", [0.002, 0.2, 1.0])
def test_bytes_of_each_store_are_those_that_it_takes(
    base: str, instruct: str, share: float, tmp_path: Path
) -> None:
    shapes = {"a.weight": (300, 700), "b.weight": (64, 64), "c.weight": (5,)}
    dtypes = getattr(torch, base), getattr(torch, instruct)
    b, i = pairs.pair(*dtypes, changed=share, rel=0.03, shapes=shapes)
    sources = pairs.sources(b, i)
    folders = write_checkpoint(tmp_path / "b", b), write_checkpoint(tmp_path / "i", i)
    measured = inspect(*folders, full=True).measured
    assert measured
    for name, size in vars(measured.total.stores).items():
        taken = 0
        for source, entry in zip(sources, registry.named(name).encode(sources)):
            owner = registry.owner(entry)
            taken += owner.nbytes(entry) + (source.base.nbytes if owner is DenseStore else 0)
        assert size == taken, name


def test_fidelity_of_a_rule_and_of_stochastic_rounding_is_that_of_the_merge(tmp_path: Path) -> None:
    pair = layered(tmp_path, layers=2, size=600_000)
    how: dict[str, Any] = {
        "rounding": "stochastic",
        "seed": 7,
        "rule": [{"match": "*q_proj*", "times": "1/2"}, {"match": "*experts.0*", "lambda": 1}],
    }
    found, sample = (
        inspect(*pair, full=full, fidelity=("0.1",), **how).measured for full in (True, False)
    )
    assert found and sample and sample.is_sampled
    merge(*pair, "0.1", tmp_path / "out", **how)
    with (
        Checkpoint.open(pair[0]) as base,
        Checkpoint.open(pair[1]) as instruct,
        Checkpoint.open(tmp_path / "out") as merged,
    ):
        for part in found.tensors:
            b, i, w = (side.tensor(part.name).double() for side in (base, instruct, merged))
            (said,) = part.fidelity
            if part.relative_norm:
                assert said.effective_lambda == pytest.approx(
                    float((w - b) @ (i - b) / (i - b).square().sum()), rel=1e-4
                )
            assert said.moved == pytest.approx(float((w != b).double().mean()), abs=1e-5)
    by_name = {
        part.name: part.fidelity[0].effective_lambda for part in found.tensors if ".0." in part.name
    }
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.05, rel=0.1)
    assert by_name["model.layers.0.mlp.experts.0.w1.weight"] == pytest.approx(1.0)
    intended = {
        part.name: part.fidelity[0].intended_lambda for part in found.tensors if ".0." in part.name
    }
    assert set(intended.values()) == {0.05, 1.0, 0.1}
    # all ‖B‖ are alike
    moved = [
        (part.fidelity[0].intended_lambda, (part.relative_norm or 0) ** 2) for part in found.tensors
    ]
    mean = sum(lam * square for lam, square in moved if lam) / sum(square for _, square in moved)
    assert found.total.fidelity[0].intended_lambda == pytest.approx(mean, rel=0.01)
    assert found.total.fidelity[0].effective_lambda == pytest.approx(mean, rel=0.02)
    assert sample.total.fidelity[0].effective_lambda == pytest.approx(
        found.total.fidelity[0].effective_lambda, rel=0.02
    )


def test_a_sample_stands_for_the_whole(tmp_path: Path) -> None:
    pair = layered(tmp_path, layers=1, size=300_000)
    sample, full = inspect(*pair, sample=True).measured, inspect(*pair, full=True).measured
    assert sample and full and sample.is_sampled
    assert sample.total.measured == 3 * measure.BLOCKS * measure.BLOCK_ELEMENTS + 16
    assert sample.total.parameters == full.total.parameters == 900_016
    assert sample.total.relative_norm == pytest.approx(full.total.relative_norm, rel=0.02)
    assert sample.total.unchanged == pytest.approx(full.total.unchanged, abs=0.01)
    assert sample.total.stores.packed == pytest.approx(full.total.stores.packed, rel=0.02)
    assert inspect(*pair, sample=True).measured == sample, "the sample is always the same"


@pytest.mark.parametrize("count", [0, 1, 65_536, 65_537, 10**6, 10**10])
@pytest.mark.parametrize("sample", [True, False])
def test_pieces_lie_inside_the_tensor_and_apart(count: int, sample: bool) -> None:
    if count > 10**8 and not sample:
        return
    spans = [span for piece in measure._pieces(count, sample) for span in piece]
    assert all(0 <= a < b <= count for a, b in spans)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    total = sum(b - a for a, b in spans)
    assert total == (min(count, 65_536) if sample else count)


def test_a_chosen_dtype_and_mixed_sides(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, torch.float32, torch.bfloat16)
    auto, wide = (
        inspect(*pair, full=True),
        inspect(*pair, full=True, dtype="float32", fidelity=(0.05,)),
    )
    assert auto.measured and wide.measured
    assert auto.live_dtypes == {"BF16": 5} and wide.live_dtypes == {"F32": 5}
    assert auto.measured.total.stores.packed == auto.measured.total.stores.dense, (
        "an fp32 base is held dense"
    )
    assert wide.measured.total.fidelity[0].effective_lambda == pytest.approx(0.05, rel=1e-5)
    assert sum(auto.measured.total.histogram[17:]) == 0


def test_a_grid_alone_measures_a_sample_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = inspect(
        *write_pair(tmp_path),
        fidelity=(0.5,),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.measured and report.base.quick_fingerprint
    assert seen[-1][0] == seen[-1][1] > 0


def test_non_finite_weights_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"w": torch.full((3,), float("inf"))}
    broken = (
        write_checkpoint(tmp_path / "x", tensors),
        write_checkpoint(tmp_path / "y", {"w": torch.ones(3)}),
    )
    with pytest.raises(DataError, match="tensor `w` of base has non-finite weights"):
        inspect(*broken, full=True)


def test_wrong_usage(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    with pytest.raises(UsageError, match="--sample and --full together"):
        inspect(*pair, sample=True, full=True)
    with pytest.raises(UsageError, match="int4"):
        inspect(*pair, sample=True, dtype="int4")
    with pytest.raises(UsageError, match="rounding and rule of no λ"):
        inspect(*pair, sample=True, rounding="stochastic")

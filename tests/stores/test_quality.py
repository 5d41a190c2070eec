"""What a report says of a delta: numpy's numbers by hand, nothing lost by what loses nothing, and
JSON both ways."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import pa_fast
from pa_fast.stores.dense import DenseStore
from pa_fast.stores.lowrank import LowRankStore
from pa_fast.stores.quality import (
    Divergence,
    OnText,
    QualityMeter,
    QualityReport,
    TensorQuality,
    quality_sums,
    report,
)
from pa_fast.stores.sparse import SparseStore
from pa_fast.stores.store import DenseEntry, Store
from tests.stores import pairs

SHAPES = {"q": (96, 128), "experts": (3, 80, 64), "norm": (64,), "long": (70_000,), "none": (0, 4)}
STORES = [
    SparseStore("topk", 0.03),
    SparseStore("topk", 0.2, scope="global"),
    SparseStore("ties"),
    SparseStore("dare", 0.1),
    LowRankStore(rank=16),
]


def numbers(
    base: torch.Tensor, instruct: torch.Tensor, end: torch.Tensor
) -> tuple[float, float, float]:
    """‖D‖², ‖D − D′‖², ‖D′‖² by numpy."""
    b, i, e = (side.double().numpy().ravel() for side in (base, instruct, end))
    return float(((i - b) ** 2).sum()), float(((i - e) ** 2).sum()), float(((e - b) ** 2).sum())


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.describe())
def test_numbers_are_those_of_numpy(store: Store) -> None:
    b, i = pairs.pair(torch.float32, changed=0.7, shapes=SHAPES)
    found = report(store, pairs.sources(b, i))
    entries = dict(zip(b, store.encode(pairs.sources(b, i))))
    made = {
        name: numbers(b[name], i[name], pairs.end(entry, b[name]))
        for name, entry in entries.items()
    }
    assert [row.name for row in found.tensors] == list(SHAPES)
    for row in found.tensors:
        delta, lost, kept = made[row.name]
        assert row.parameters == math.prod(SHAPES[row.name]) and row.bytes == pairs.nbytes(
            entries[row.name]
        )
        assert row.norm == pytest.approx(math.sqrt(delta), rel=1e-6)
        if row.parameters:
            assert row.relative_error == pytest.approx(math.sqrt(lost / delta), rel=1e-5, abs=1e-6)
            assert row.energy == pytest.approx(kept / delta, rel=1e-5)
    delta, lost, kept = np.array(list(made.values())).sum(0)
    assert (
        found.relative_error == pytest.approx(math.sqrt(lost / delta), rel=1e-5)
        and found.relative_error > 0.1
    )
    assert found.energy == pytest.approx(kept / delta, rel=1e-5)
    sizes = np.array([math.prod(shape) for shape in SHAPES.values()])
    for whole, each in ((found.mean_error, "relative_error"), (found.mean_energy, "energy")):
        assert whole == pytest.approx(
            float(sizes @ [getattr(row, each) for row in found.tensors] / sizes.sum())
        )
    assert (
        found.bytes == sum(map(pairs.nbytes, entries.values())) and found.parameters == sizes.sum()
    )
    assert found.bytes_per_parameter == found.bytes / found.parameters
    assert (found.name, found.options, found.lossless) == (
        store.name,
        store.describe(),
        store.lossless,
    )


@pytest.mark.parametrize("store", [DenseStore(), SparseStore()])
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_what_loses_nothing_has_exactly_no_error(store: Store, dtypes: tuple[str, str]) -> None:
    b, i = pairs.pair(*(getattr(torch, dtype) for dtype in dtypes))
    found = report(store, pairs.sources(b, i))
    assert found.lossless and (found.relative_error, found.energy) == (0.0, 1.0)
    assert (found.mean_error, found.mean_energy) == (0.0, pytest.approx(1.0, abs=1e-15))
    assert {(row.relative_error, row.energy) for row in found.tensors} == {(0.0, 1.0)}


def test_a_cut_of_low_rank_has_the_error_that_its_rounded_weights_have() -> None:
    b, i = pairs.pair(changed=1.0, shapes={"w": (96, 128)})
    w = pairs.live_like(b)
    weights = pa_fast.LiveWeights.bind(
        w, b, i, (measured := QualityMeter(LowRankStore(rank=16))).store
    )
    weights.set_lambda(1)
    delta, lost, kept = numbers(b["w"], i["w"], w["w"])
    (row,) = measured.report().tensors
    assert row.kind == "factors" and row.relative_error == pytest.approx(
        math.sqrt(lost / delta), rel=1e-5
    )
    assert row.energy == pytest.approx(kept / delta, rel=1e-5)


def test_kinds_are_those_of_the_file() -> None:
    b, i = pairs.pair(changed=0.02, shapes={"index": (70_000,), "whole": (8,)})
    i["whole"] = b["whole"] + 1
    b["bitmap"], i["bitmap"] = torch.zeros(70_000), (torch.arange(70_000) % 5 == 0).float()
    found = report(SparseStore(), pairs.sources(b, i))
    assert all(row.kind == row.name for row in found.tensors)


def test_a_measured_store_yields_the_entries_of_its_store_and_can_be_asked_again() -> None:
    b, i = pairs.pair()
    measured = QualityMeter(SparseStore("topk", 0.01))
    for _ in range(2):
        for made, expected in zip(
            measured.store.encode(pairs.sources(b, i)),
            SparseStore("topk", 0.01).encode(pairs.sources(b, i)),
        ):
            assert type(made) is type(expected) and pairs.nbytes(made) == pairs.nbytes(expected)
        assert len(measured.report().tensors) == len(b)
    assert (measured.store.name, measured.store.exact, measured.store.lossless) == (
        "sparse",
        True,
        False,
    )


def test_equal_sides_lose_nothing_and_nonsense_has_no_number() -> None:
    b, _ = pairs.pair()
    assert (
        report(LowRankStore(), pairs.sources(b, b)).relative_error,
        report(DenseStore(), []).parameters,
    ) == (0.0, 0)
    (source,) = pairs.sources({"w": torch.zeros(4)}, {"w": torch.zeros(4)})
    assert math.isnan(quality_sums(source, DenseEntry(torch.ones(4))).relative_error)
    (source,) = pairs.sources({"w": torch.zeros(4)}, {"w": torch.full((4,), math.nan)})
    assert math.isnan(quality_sums(source, DenseEntry(torch.ones(4))).relative_error)


def test_json_and_back() -> None:
    b, i = pairs.pair()
    plain = report(SparseStore("ties"), pairs.sources(b, i))
    spoken = replace(
        plain,
        text=OnText("ab", 7, 4, 2, (Divergence("0.5", 0.1, 0.9), Divergence("1", 1 / 3, 1.0))),
    )
    for said in (plain, spoken):
        assert QualityReport.from_json(said.to_json()) == said
    odd = replace(
        spoken,
        energy=math.nan,
        tensors=(TensorQuality("w", "whole", 1, 2, 0.0, math.nan, math.nan),),
    )
    written = odd.to_json()
    assert json.loads(written)["energy"] is None and "NaN" not in written
    back = QualityReport.from_json(written)
    assert (
        math.isnan(back.energy)
        and math.isnan(back.tensors[0].relative_error)
        and back.text == odd.text
    )

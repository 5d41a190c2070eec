"""The CPU path of the sparse set against the reference, at the positions and everywhere else."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import Lerp, Sparse, SparseTensor, reference, sparse_set_
from torch import Tensor

from tests.kernels.pairs import LAMBDAS, TRIPLES, bits, same, sparse, sparsely_set

KINDS = ("index", "bitmap")
SIZES = (0, 1, 33, 4097, 70_000)


def live_like(entry: SparseTensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights of which none may change outside the positions."""
    return torch.randn(entry.numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES, ids=str)
def test_every_dtype_triple(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    entries = [sparse(size, base, inst, 0.07, kind, seed=size) for size in SIZES for kind in KINDS]
    entries += [sparse(5000, base, inst, 1.0, kind) for kind in KINDS]
    before = [live_like(entry, out) for entry in entries]
    live = [w.clone() for w in before]
    prepared = Sparse(live, entries)
    for lam in (-0.2, 0.0, 0.05, 0.5, 0.999, 1.0, 3.7):
        prepared.run_(lam)
        for w, old, entry in zip(live, before, entries):
            assert torch.equal(bits(w), bits(sparsely_set(old, entry, lam))), (
                lam,
                entry.numel,
                entry.kind,
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 1e-5, 0.001, 0.3, 1.0])
def test_more_than_one_piece(kind: str, density: float) -> None:
    entry = sparse(400_000, torch.bfloat16, torch.bfloat16, density, kind)
    before = live_like(entry, torch.bfloat16)
    with mock.patch("pa_kernels.sparse.PIECE", 300):
        w = before.clone()
        prepared = Sparse([w], [entry])
        assert len(prepared.groups[0].pieces) == (
            0 if density == 0 else 1 if density == 1e-5 else min(7, entry.count // 300 + 1)
        )
        for lam in (0.3, 0.6):
            prepared.run_(lam)
            assert torch.equal(bits(w), bits(sparsely_set(before, entry, lam))), lam


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_equals_a_dense_switch_of_the_same_pair(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    b = torch.randn(50_000, generator=generator).to(dtype)
    mask = torch.rand(50_000, generator=generator) < 0.05
    i = torch.where(mask, (b.float() * 1.1).to(dtype), b)
    dense, live = torch.empty_like(b), b.clone()
    lerp, prepared = (
        Lerp([dense], [b], [i]),
        Sparse([live], [SparseTensor.encode(mask, b[mask], i[mask], 50_000)]),
    )
    for lam in LAMBDAS:
        lerp.run_(lam)
        prepared.run_(lam)
        assert torch.equal(bits(live), bits(dense)), lam


@pytest.mark.parametrize("intermediate", reference.LIVE_DTYPES, ids=str)
@pytest.mark.parametrize("out", reference.LIVE_DTYPES, ids=str)
def test_an_intermediate_dtype(out: torch.dtype, intermediate: torch.dtype) -> None:
    entry = sparse(20_000, torch.float32, torch.bfloat16, 0.1)
    before = live_like(entry, out)
    for lam in (0.0, 0.05, 0.6, 1.0):
        w = before.clone()
        sparse_set_([w], [entry], lam, intermediate_dtypes=[intermediate])
        assert torch.equal(bits(w), bits(sparsely_set(before, entry, lam, intermediate)))


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES[::4], ids=str)
def test_non_finite_values(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    entry = sparse(60_000, base, inst, 0.1, finite=False)
    before = live_like(entry, out)
    for lam in (0.0, 0.3, 0.6, 1.0, -0.2):
        w = before.clone()
        sparse_set_([w], [entry], lam)
        assert same(w, sparsely_set(before, entry, lam)), lam


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_no_history_and_endpoints_are_the_sources_bits(dtype: torch.dtype) -> None:
    entry = sparse(30_001, dtype, dtype, 0.2)
    before = live_like(entry, dtype)
    w = before.clone()
    prepared = Sparse([w], [entry])
    for lam in [*LAMBDAS, *reversed(LAMBDAS), 0.7]:
        prepared.run_(lam)
        assert torch.equal(bits(w), bits(sparsely_set(before, entry, lam)))
    for lam, values in ((0, entry.base), (1, entry.target), (-0.0, entry.base)):
        prepared.run_(lam)
        assert torch.equal(bits(w[entry.positions()]), bits(values))


def test_a_lambda_for_each_tensor_and_the_table_that_launch_reads() -> None:
    entries = [
        sparse(3000 * t + 5, torch.bfloat16, torch.float32, 0.1, KINDS[t % 2], seed=t)
        for t in range(5)
    ]
    before = [live_like(entry, torch.bfloat16, t) for t, entry in enumerate(entries)]
    live = [w.clone() for w in before]
    lams = [0.0, 0.3, 1.0, 1.5, 0.25]
    prepared = Sparse(live, entries)
    prepared.run_(lams)
    for w, old, entry, lam in zip(live, before, entries, lams):
        assert torch.equal(bits(w), bits(sparsely_set(old, entry, lam)))
    (group,) = prepared.groups
    assert group.entries == tuple(range(5))
    group.lams.fill_(0.7)
    prepared.launch_()
    for w, old, entry in zip(live, before, entries):
        assert torch.equal(bits(w), bits(sparsely_set(old, entry, 0.7)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_beside_the_tensor(kind: str) -> None:
    for size in (1, 5, 4096, 65_539):
        entry = sparse(size, torch.bfloat16, torch.bfloat16, 1.0, kind)
        storage = torch.full((size + 65,), 7.0, dtype=torch.bfloat16)
        sparse_set_([storage[33 : 33 + size]], [entry], 0.3)
        assert bool((storage[:33] == 7).all()) and bool((storage[33 + size :] == 7).all())
        assert torch.equal(
            bits(storage[33 : 33 + size]), bits(reference.lerp(entry.base, entry.target, 0.3))
        )


@settings(max_examples=60)
@given(
    st.sampled_from(TRIPLES),
    st.dictionaries(
        st.integers(0, 99), st.tuples(st.floats(width=16), st.floats(width=16)), max_size=40
    ),
    st.floats(-4, 4, width=32),
    st.sampled_from(KINDS),
)
def test_hypothesis(
    triple: tuple[torch.dtype, torch.dtype, torch.dtype],
    values: dict[int, tuple[float, float]],
    lam: float,
    kind: str,
) -> None:
    out, base, inst = triple
    places = sorted(values)
    b = torch.tensor([values[p][0] for p in places], dtype=base)
    d = torch.tensor([values[p][1] for p in places], dtype=inst)
    entry = SparseTensor.encode(torch.tensor(places, dtype=torch.int64), b, d, 100, kind=kind)
    w = torch.arange(100).to(out)
    expected = sparsely_set(w, entry, lam)
    sparse_set_([w], [entry], lam)
    assert same(w, expected)


def test_without_an_exact_torch_lerp() -> None:
    entry = sparse(50_000, torch.float32, torch.bfloat16, 0.1)
    before = live_like(entry, torch.bfloat16)
    w = before.clone()
    with (
        mock.patch("pa_kernels.dense.torch_lerp_is_exact", lambda *_: False),
        mock.patch("torch.lerp", side_effect=AssertionError),
    ):
        sparse_set_([w], [entry], 0.3)
    assert torch.equal(bits(w), bits(sparsely_set(before, entry, 0.3)))


def test_flushed_denormals_are_refused() -> None:
    entry = sparse(100, torch.float32, torch.float32, 0.5)
    prepared = Sparse([torch.zeros(100)], [entry])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            prepared.run_(0.3)
    finally:
        torch.set_flush_denormal(False)


def test_parameters_and_inference_tensors() -> None:
    entry = sparse(1000, torch.float32, torch.float32, 0.1)
    parameter = torch.nn.Parameter(torch.ones(10, 100))
    with torch.inference_mode():
        frozen = torch.ones(1000)
        frozen_entry = replace(entry, base=entry.base.clone(), where=entry.where.clone())
    expected = sparsely_set(torch.ones(1000), entry, 0.3)
    Sparse([parameter, frozen], [frozen_entry, entry]).run_(0.3)
    assert torch.equal(parameter.detach().view(-1), expected) and torch.equal(frozen, expected)
    assert parameter.requires_grad


ENTRY = sparse(6, torch.float32, torch.float32, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": [torch.zeros(2, 3)]}, ValueError, "1 live tensors, 2 sparse"),
        (
            {"out": [torch.zeros(2, 3), torch.zeros(7)]},
            ValueError,
            "entry 1: sparse is of 6 elements, the live tensor has 7",
        ),
        (
            {"out": [torch.zeros(6).long(), torch.zeros(6)]},
            TypeError,
            "entry 0: live is torch.int64, expected",
        ),
        (
            {"out": [torch.zeros(6), torch.zeros(3, 2).t()]},
            ValueError,
            r"entry 1: live has strides \(1, 2\)",
        ),
        (
            {"out": [torch.zeros(6), torch.zeros(6, device="meta")]},
            ValueError,
            "entry 1: on meta, expected cpu or cuda",
        ),
        ({"entries": [ENTRY, "x"]}, TypeError, "entry 1: sparse is str, expected a SparseTensor"),
        (
            {"entries": [ENTRY, replace(ENTRY, where=ENTRY.where.int().flip(0).to(torch.uint16))]},
            ValueError,
            "entry 1: place 4 of entry 1 follows place 5",
        ),
        (
            {"intermediate_dtypes": [torch.float64, None]},
            TypeError,
            "entry 0: intermediate_dtype is torch.float64",
        ),
        ({"lam": math.nan}, ValueError, "λ is nan"),
        ({"lam": [0.5]}, ValueError, "1 λ for 2 tensors"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {
        "out": [torch.zeros(2, 3), torch.zeros(6)],
        "entries": [ENTRY, ENTRY],
        "lam": 0.5,
        "intermediate_dtypes": None,
    } | change
    with pytest.raises(error, match=message):
        sparse_set_(
            given["out"],
            given["entries"],
            given["lam"],
            intermediate_dtypes=given["intermediate_dtypes"],
        )


def test_what_a_hostile_entry_would_write_is_never_written() -> None:
    entry = sparse(65_536 + 10, torch.float32, torch.float32, 0.01, "index")
    last = torch.tensor([*entry.where.tolist()[:-1], 65_535], dtype=torch.uint16)
    starts = entry.starts.clone()
    starts[1] = entry.count - 1
    storage = torch.zeros(200_000)
    with pytest.raises(ValueError, match="entry 0: position 131071 in a tensor of 65546 elements"):
        sparse_set_([storage[: entry.numel]], [replace(entry, where=last, starts=starts)], 1.0)
    assert not bool(storage.any())


def test_no_tensors() -> None:
    sparse_set_([], [], 0.5)
    with pytest.raises(ValueError, match="finite"):
        sparse_set_([], [], math.inf)

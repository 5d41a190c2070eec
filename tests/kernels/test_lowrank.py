"""The CPU path of the low-rank merge: near the reference, equal where sums are exact, the same bits
every time."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import LowRank, lowrank_merge_, reference
from pa_kernels.cores import one_core
from pa_kernels.lowrank import COLUMNS, ROWS, padded
from torch import Tensor

from tests.kernels.pairs import bits
from tests.kernels.products import KINDS, exact_matrix, matrix, near, ulps

SHAPES = (
    ((33, 70), 5),
    ((1, 1), 1),
    ((0, 4), 2),
    ((4, 0), 2),
    ((0, 3, 3), 1),
    ((3, 20, 17), 16),
    ((7, 9), 0),
)
LAMBDAS = (-2.3, -0.2, 0.05, 1 / 3, 0.5, 1.0, 1.5, 0.0)


def blank(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype)


@pytest.mark.parametrize(("out", "base", "factor"), KINDS, ids=str)
def test_every_dtype(out: torch.dtype, base: torch.dtype, factor: torch.dtype) -> None:
    entries = [matrix(shape, rank, base, factor, seed) for seed, (shape, rank) in enumerate(SHAPES)]
    live = [blank(b, out) for b, _, _ in entries]
    merge = LowRank(live, *zip(*entries))
    for lam in LAMBDAS:
        merge.run_(lam)
        assert all(near(w, entry, lam) for w, entry in zip(live, entries)), lam


@pytest.mark.parametrize("intermediate", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("out", "base", "factor"), KINDS, ids=str)
def test_bits_of_the_reference_where_sums_are_exact(
    out: torch.dtype, base: torch.dtype, factor: torch.dtype, intermediate: torch.dtype | None
) -> None:
    b, u, v = exact_matrix((ROWS + 5, 90), 37, base, factor)
    w = blank(b, out)
    for step in (0, 1, 77, 128, 255, 256, 300, -40):
        lowrank_merge_([w], [b], [u], [v], step / 256, intermediate_dtypes=[intermediate])
        assert torch.equal(
            bits(w), bits(reference.lowrank(b, u, v, step / 256, out, intermediate))
        ), step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [16, 256])
def test_within_one_ulp_where_nothing_cancels(dtype: torch.dtype, rank: int) -> None:
    b, u, v = matrix((ROWS + 30, 400), rank, dtype, dtype)
    u = (u.float() * 0.01).to(dtype)
    b = (b.float() + torch.copysign(torch.full_like(b, 0.01, dtype=torch.float32), b.float())).to(
        dtype
    )
    w = blank(b, dtype)
    for lam in (0.3, -1.0, 2.0):
        lowrank_merge_([w], [b], [u], [v], lam)
        with one_core():
            apart = ulps(w, reference.lowrank(b, u, v, lam))
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) < 1e-3


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 256, 1000])
def test_within_the_stated_bound_whatever_cancels(dtype: torch.dtype, rank: int) -> None:
    g = torch.Generator().manual_seed(rank)
    b, u, v = matrix((ROWS + 2, 90), rank, dtype, dtype)
    u[: rank and ROWS] *= torch.exp2(torch.randint(-6, 6, (ROWS, 1), generator=g)).to(dtype)
    half = rank // 2  # the second half of the terms takes back the first, but for a little
    u[:, half : 2 * half] = -u[:, :half]
    v[half : 2 * half] = v[:half] + (v[:half].float() * 2**-9).to(dtype)
    w = blank(b, dtype)
    for lam in (0.3, -1.0, 2.0, 1.0):
        real = b.double() + reference.fp32(lam) * (u.double() @ v.double())
        b[::3] = (b.double() - real)[::3].to(dtype)  # and B takes back λ·UV
        lowrank_merge_([w], [b], [u], [v], lam)
        assert near(w, (b, u, v), lam), lam
        with one_core():
            apart = ulps(w, reference.lowrank(b, u, v, lam))
        # one ulp is not what fp32 is promised
        assert dtype != torch.float32 or rank < 256 or int(apart.max()) > 100


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_lambda_0_is_the_base_whatever_the_factors_hold(dtype: torch.dtype) -> None:
    b, u, v = matrix((50, 40), 3, dtype, torch.float32)
    b[3, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    bits(b)[3, 0] |= 3
    u[5], v[:, 7] = math.nan, math.inf
    w = blank(b, dtype)
    for lam in (0, 0.0, -0.0):
        lowrank_merge_([w], [b], [u], [v], lam)
        assert torch.equal(bits(w), bits(b))
    wide = blank(b, torch.float32)
    lowrank_merge_([wide], [b], [u], [v], 0.0)
    assert torch.equal(wide[4:], b[4:].float())


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_a_delta_of_zero_leaves_the_bases_bits(dtype: torch.dtype) -> None:
    b, u, v = matrix((60, 70), 20, dtype, dtype)
    assert bool((b[::7] == 0).any())
    w = blank(b, dtype)
    for lam in (0.3, -0.3, 1.0):
        lowrank_merge_([w], [b], [u], [v], lam)
        assert torch.equal(bits(w[::7]), bits(b[::7])), lam
        assert not torch.equal(bits(w[1]), bits(b[1]))


def test_ranks_and_lambdas_differ_from_tensor_to_tensor() -> None:
    ranks, lams = (0, 1, 17, 64), [0.5, 0.0, 1.5, -0.25]
    entries = [matrix((40, 30), rank, torch.bfloat16, torch.bfloat16, rank) for rank in ranks]
    live = [blank(b, b.dtype) for b, _, _ in entries]
    lowrank_merge_(live, *zip(*entries), lams)
    assert all(near(w, entry, lam) for w, entry, lam in zip(live, entries, lams))
    assert torch.equal(bits(live[0]), bits(entries[0][0]))


def test_no_history() -> None:
    b, u, v = matrix((200, 300), 33, torch.float32, torch.bfloat16)
    w = blank(b, b.dtype)
    merge = LowRank([w], [b], [u], [v])
    first = {}
    for lam in (*LAMBDAS, *reversed(LAMBDAS)):
        merge.run_(lam)
        assert torch.equal(bits(first.setdefault(lam, w.clone())), bits(w)), lam


def test_launch_reads_the_lambda_table() -> None:
    b, u, v = exact_matrix((50, 60), 4, torch.bfloat16, torch.bfloat16)
    w = blank(b, b.dtype)
    merge = LowRank([w], [b], [u], [v])
    (group,) = merge.groups
    assert group.entries == (0,)
    group.lams.fill_(0.25)
    merge.launch_()
    assert torch.equal(bits(w), bits(reference.lowrank(b, u, v, 0.25)))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float32], ids=str)
def test_rows_merged_aside_have_the_bits_of_the_switch(threads: int, factor: torch.dtype) -> None:
    entries = [
        matrix((2 * ROWS + 40, COLUMNS + 200), 48, torch.float32, factor),
        matrix((3, ROWS + 9, 65), 20, torch.float32, factor),
    ]
    live = [blank(b, b.dtype) for b, _, _ in entries]
    merge = LowRank(live, *zip(*entries))
    merge.run_(0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for t, w in enumerate(live):
            stacked = w.reshape(-1, w.shape[-1])
            end = stacked.shape[0]
            for start, stop in (
                (0, end),
                (0, 1),
                (5, 5),
                (end, end),
                (ROWS - 1, ROWS + 1),
                (ROWS + 3, end),
                (end - 1, end),
            ):
                found = merge.merged(t, slice(start, stop), 0.3)
                assert torch.equal(bits(found), bits(stacked[start:stop])), (t, start, stop)
        with ThreadPoolExecutor(2) as pool:
            rows = [slice(start, start + 30) for start in range(0, 2 * ROWS, 30)]
            for part, found in zip(rows, pool.map(lambda part: merge.merged(0, part, 0.3), rows)):
                assert torch.equal(bits(found), bits(live[0][part]))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(bits(merge.merged(0, slice(0, 9), 0.7)), bits(live[0][:9]))


def test_a_merge_aside_needs_no_live_values() -> None:
    b, u, v = matrix((30, 20), 4, torch.bfloat16, torch.bfloat16)
    w = torch.full_like(b, math.nan)
    assert near(LowRank([w], [b], [u], [v]).merged(0, slice(0, 30), 0.3), (b, u, v), 0.3)
    assert bool(w.isnan().all())


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 40), st.integers(0, 40), st.data())
def test_any_rows_of_any_shape(
    count: int, height: int, width: int, rank: int, data: st.DataObject
) -> None:
    entry = matrix((count, height, width), rank, torch.float16, torch.float16, seed=height)
    w = blank(entry[0], torch.float16)
    merge = LowRank([w], *([x] for x in entry))
    merge.run_(0.6)
    assert near(w, entry, 0.6)
    start = data.draw(st.integers(0, count * height))
    stop = data.draw(st.integers(start, count * height))
    found = merge.merged(0, slice(start, stop), 0.6)
    assert torch.equal(bits(found), bits(w.view(-1, width)[start:stop]))


def test_a_process_that_allows_short_factors_changes_nothing() -> None:
    entry = matrix((ROWS, 300), 64, torch.float32, torch.float32)
    w = blank(entry[0], torch.float32)
    merge = LowRank([w], *([x] for x in entry))
    merge.run_(0.3)
    expected, product = w.clone(), entry[1] @ entry[2]
    torch.set_float32_matmul_precision("medium")
    try:
        merge.run_(0.3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(bits(w), bits(expected))
    assert torch.equal(entry[1] @ entry[2], product)


def test_padded_factors_have_the_same_product() -> None:
    _, u, v = exact_matrix((3, 20, 30), 37, torch.bfloat16, torch.bfloat16)
    wide, long = padded(u, v)
    assert wide.shape == (3, 20, 48) and long.shape == (3, 48, 30)
    assert torch.equal(reference.product(wide, long), reference.product(u, v))
    assert padded(wide, long)[0] is wide and padded(wide, long)[1] is long


def test_parameters_and_inference_tensors() -> None:
    b, u, v = exact_matrix((20, 30), 4, torch.float32, torch.float32)
    parameter = torch.nn.Parameter(torch.zeros(20, 30))
    with torch.inference_mode():
        frozen = torch.zeros(20, 30)
    merge = LowRank(
        [parameter, frozen], [b, torch.nn.Parameter(b)], [u, u], [v, torch.nn.Parameter(v)]
    )
    merge.run_(0.25)
    expected = reference.lowrank(b, u, v, 0.25)
    assert torch.equal(parameter.detach(), expected) and torch.equal(frozen, expected)
    assert parameter.requires_grad
    assert torch.equal(merge.merged(0, slice(0, 20), 0.25), expected)


def test_flushed_denormals_are_refused() -> None:
    b, u, v = matrix((5, 6), 2, torch.float32, torch.float32)
    merge = LowRank([b.clone()], [b], [u], [v])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            merge.run_(0.3)
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            merge.merged(0, slice(0, 5), 0.3)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": [torch.zeros(2, 3)]}, ValueError, "1 live tensors, 2 base, 2 U, 2 V"),
        (
            {"out": [torch.zeros(6)] * 2},
            ValueError,
            r"entry 0: live has shape \(6,\), expected \[M, N\] or \[E, M, N\]",
        ),
        (
            {"base": [torch.zeros(2, 3), torch.zeros(3, 2)]},
            ValueError,
            r"entry 1: base has shape \(3, 2\), expected \(2, 3\)",
        ),
        (
            {"u": [torch.zeros(3, 4)] * 2},
            ValueError,
            r"entry 0: U has shape \(3, 4\), expected \(2, 4\) beside .* rank 4",
        ),
        ({"u": [torch.zeros(())] * 2}, ValueError, r"entry 0: U has shape \(\), expected \(2, 0\)"),
        (
            {"v": [torch.zeros(5, 3)] * 2},
            ValueError,
            r"entry 0: V has shape \(5, 3\), expected \(4, 3\)",
        ),
        ({"u": [torch.zeros(1, 2, 4)] * 2}, ValueError, r"entry 0: U has shape \(1, 2, 4\)"),
        (
            {"v": [torch.zeros(4, 3).bfloat16()] * 2},
            TypeError,
            "entry 0: U is torch.float32 and V is torch.bfloat16",
        ),
        ({"u": [torch.zeros(2, 4).long()] * 2}, TypeError, "entry 0: U is torch.int64, expected"),
        ({"v": ["x", "y"]}, TypeError, "entry 0: V is str, expected"),
        ({"v": [torch.zeros(3, 4).t()] * 2}, ValueError, r"entry 0: V has strides \(1, 4\)"),
        (
            {"base": [torch.zeros(2, 3, device="meta")] * 2},
            ValueError,
            "entry 0: base is on meta, the live tensor on cpu",
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
    zeros = {
        "out": [torch.zeros(2, 3)] * 2,
        "base": [torch.zeros(2, 3)] * 2,
        "u": [torch.zeros(2, 4)] * 2,
    }
    given = {
        **zeros,
        "v": [torch.zeros(4, 3)] * 2,
        "intermediate_dtypes": None,
        "lam": 0.5,
        **change,
    }
    with pytest.raises(error, match=message):
        lowrank_merge_(
            given["out"],
            given["base"],
            given["u"],
            given["v"],
            given["lam"],
            intermediate_dtypes=given["intermediate_dtypes"],
        )


@pytest.mark.parametrize(
    "rows", [slice(0, 3), slice(2, 1), slice(-1, 1), slice(0, 2, 2), slice(None)], ids=str
)
def test_rows_that_are_no_range_of_the_tensor_are_refused(rows: slice) -> None:
    merge = LowRank(
        [torch.zeros(2, 3)], [torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.zeros(1, 3)]
    )
    with pytest.raises(
        ValueError, match=r"entry 0: rows slice.*expected a range within its 2 rows"
    ):
        merge.merged(0, rows, 0.5)


def test_no_tensors() -> None:
    lowrank_merge_([], [], [], [], 0.5)
    with pytest.raises(ValueError, match="finite"):
        lowrank_merge_([], [], [], [], math.inf)

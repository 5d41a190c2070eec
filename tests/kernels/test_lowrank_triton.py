"""The low-rank kernel's body: on a GPU where there is one, else in Triton's interpreter
(`test_interpreter.py` runs it so)."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from pa_kernels import LowRank, lowrank_merge_, reference
from torch import Tensor

from tests.kernels.pairs import INTERPRETED, bits, sampled
from tests.kernels.products import KINDS, Matrix, exact_matrix, matrix, near

pytestmark = [
    pytest.mark.triton,
    # numpy, under the interpreter, says what infinities do
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = (
    ((64, 128), 16),
    ((70, 272), 40),
    ((2, 66, 16), 3),
    ((5, 7), 2),
    ((0, 16), 4),
    ((3, 0), 1),
    ((64, 128), 0),
)
"""Whole tiles, tiles of which some are whole, stacks, ranks that must be padded, and nothing at
all."""


def on_device(entry: Matrix, skip: int = 0) -> Matrix:
    """Copies on the tested device that start `skip` elements into their storage, so that they may
    be misaligned."""
    return tuple(shifted(tensor, skip) for tensor in entry)  # type: ignore[return-value]


def shifted(tensor: Tensor, skip: int) -> Tensor:
    storage = torch.empty(tensor.numel() + skip, dtype=tensor.dtype, device=DEVICE)
    storage[skip:] = tensor.to(DEVICE).view(-1)
    return storage[skip:].view(tensor.shape)


def blank(like: Tensor, dtype: torch.dtype, skip: int = 0) -> Tensor:
    return shifted(torch.full(like.shape, 9.0, dtype=dtype), skip)


def check(
    out: torch.dtype, base: torch.dtype, factor: torch.dtype, lams: tuple[float, ...]
) -> None:
    entries = [matrix(shape, rank, base, factor, seed) for seed, (shape, rank) in enumerate(SHAPES)]
    skips = [0] * len(entries) + [1]
    entries.append(matrix((64, 128), 16, base, factor, 9))
    live = [blank(entry[0], out, skip) for entry, skip in zip(entries, skips)]
    merge = LowRank(live, *zip(*(on_device(entry, skip) for entry, skip in zip(entries, skips))))
    for lam in lams:
        merge.run_(lam)
        assert all(near(w, entry, lam) for w, entry in zip(live, entries)), lam


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_one_dtype(dtype: torch.dtype) -> None:
    check(dtype, dtype, dtype, (-2.3, 0.3, 1.0, 0.0))


@pytest.mark.parametrize(
    ("out", "base", "factor"), sampled([kind for kind in KINDS if len(set(kind)) > 1], 6), ids=str
)
def test_mixed_dtypes(out: torch.dtype, base: torch.dtype, factor: torch.dtype) -> None:
    check(out, base, factor, (0.3, 0.0))


@pytest.mark.parametrize(
    ("factor", "intermediate"),
    # each of both once, then all
    sampled(list(product(reference.LIVE_DTYPES, (None, torch.bfloat16, torch.float16))), 4),
    ids=str,
)
def test_bits_of_the_reference_where_sums_are_exact(
    factor: torch.dtype, intermediate: torch.dtype | None
) -> None:
    for out, base, shape in (
        (torch.float32, torch.float32, (64, 128)),
        (torch.bfloat16, torch.bfloat16, (67, 150)),
    ):
        entry = exact_matrix(shape, 50, base, factor)
        b, u, v = on_device(entry)
        w = blank(entry[0], out)
        for step in (0, 77, 256, -40):
            lowrank_merge_([w], [b], [u], [v], step / 256, intermediate_dtypes=[intermediate])
            assert torch.equal(
                bits(w), bits(reference.lowrank(*entry, step / 256, out, intermediate))
            ), step


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_the_bases_bits_at_lambda_0_and_where_the_delta_is_0(dtype: torch.dtype) -> None:
    for shape in ((64, 128), (65, 130)):
        entry = matrix(shape, 16, dtype, dtype)
        b, u, v = on_device(entry)
        w = blank(entry[0], dtype)
        for lam in (0.3, -0.3):
            lowrank_merge_([w], [b], [u], [v], lam)
            assert torch.equal(bits(w)[::7], bits(b)[::7]), lam
            assert not torch.equal(bits(w)[1], bits(b)[1])
        b[3, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
        u.fill_(float("inf"))
        lowrank_merge_([w], [b], [u], [v], 0.0)
        assert torch.equal(bits(w), bits(b))


def test_a_lambda_for_each_tensor_and_every_dtype_at_once() -> None:
    entries = [
        (kind[0], matrix((30, 48), 16 * seed, *kind[1:], seed))
        for seed, kind in enumerate(KINDS[::7])
    ]
    live = [blank(entry[0], out) for out, entry in entries]
    lams = [0.5, 0.0, 1.5, -0.25][: len(live)]
    merge = LowRank(live, *zip(*(on_device(entry) for _, entry in entries)))
    assert sorted(t for group in merge.groups for t in group.entries) == list(range(len(live)))
    merge.run_(lams)
    assert all(near(w, entry, lam) for w, (_, entry), lam in zip(live, entries, lams))


def test_rows_merged_aside_have_the_bits_of_the_switch() -> None:
    entries = [
        matrix((150, 272), 40, torch.float32, torch.bfloat16, 0),
        matrix((3, 66, 16), 16, torch.float32, torch.bfloat16, 1),
    ]
    skips = [0, 0, 1]
    entries.append(matrix((64, 128), 16, torch.float32, torch.bfloat16, 2))
    live = [blank(entry[0], torch.float32, skip) for entry, skip in zip(entries, skips)]
    merge = LowRank(live, *zip(*(on_device(entry, skip) for entry, skip in zip(entries, skips))))
    merge.run_(0.3)
    for t, w in enumerate(live):
        stacked = w.reshape(-1, w.shape[-1])
        end = stacked.shape[0]
        for start, stop in (
            (0, end),
            (0, 1),
            (4, 4),
            (end, end),
            (60, min(65, end)),
            (end - 1, end),
        ):
            assert torch.equal(
                bits(merge.merged(t, slice(start, stop), 0.3)), bits(stacked[start:stop])
            ), (t, start, stop)
        before = w.clone()
        assert not torch.equal(bits(merge.merged(t, slice(0, 9), 0.7)), bits(stacked[:9]))
        assert torch.equal(bits(w), bits(before))


def test_writes_nothing_beside_its_tensors() -> None:
    for shape in ((64, 128), (5, 7), (65, 144)):
        entry = exact_matrix(shape, 16, torch.bfloat16, torch.bfloat16)
        size = entry[0].numel()
        storage = torch.full((size + 64,), 7.0, dtype=torch.bfloat16, device=DEVICE)
        b, u, v = on_device(entry)
        lowrank_merge_([storage[32 : 32 + size].view(shape)], [b], [u], [v], 0.25)
        assert bool((storage[:32] == 7).all()) and bool((storage[32 + size :] == 7).all())
        assert torch.equal(
            bits(storage[32 : 32 + size].view(shape)), bits(reference.lowrank(*entry, 0.25))
        )


def test_columns_beyond_the_reach_of_a_tile_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pa_kernels import lowrank_triton

    monkeypatch.setattr(lowrank_triton, "WIDEST", 40)
    b, u, v = on_device(matrix((2, 40), 1, torch.float32, torch.float32))
    with pytest.raises(ValueError, match="entry 0: 40 columns of rank 16, expected fewer than 40"):
        LowRank([b.clone()], [b], [u], [v])

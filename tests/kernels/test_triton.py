"""Kernel bodies: on a GPU where there is one, else in Triton's interpreter on CPU tensors
(`test_interpreter.py` runs it so)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pa_kernels import Lerp, Sparse, SparseTensor, checksum, lerp_, reference, sparse_set_
from pa_kernels.reference import DRAW_STEP, Draw
from torch import Tensor

from tests.kernels.pairs import (
    INTERPRETED,
    LAMBDAS,
    TRIPLES,
    bits,
    pair,
    same,
    sampled,
    sparse,
    sparsely_set,
)

pytestmark = [
    pytest.mark.triton,
    # numpy, under the interpreter, says what infinities do
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
fused = pytest.mark.usefixtures("fused_multiply_add")

DEVICE = "cpu" if INTERPRETED else "cuda"
BLOCK = 2048
SIZES = (0, 1, 300, BLOCK, 2 * BLOCK + 100)
MIXES = [triple for triple in TRIPLES if len(set(triple)) > 1]


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the interpreter an fma that rounds once, so that any data can be held to its bits."""
    if INTERPRETED:
        from tests.without_gpu import fused_multiply_add

        builder, fma = fused_multiply_add()
        monkeypatch.setattr(builder, "create_fma", fma)


def on_device(tensor: Tensor, skip: int = 0) -> Tensor:
    """A copy on the tested device that starts `skip` elements into its storage, so that it may be
    misaligned."""
    storage = torch.empty(tensor.numel() + skip, dtype=tensor.dtype, device=DEVICE)
    storage[skip:] = tensor.to(DEVICE)
    return storage[skip:]


def check(
    out: torch.dtype,
    base: torch.dtype,
    inst: torch.dtype,
    lams: tuple[float, ...],
    intermediate: torch.dtype | None = None,
    **kind: Any,
) -> None:
    sources = [pair(size, base, inst, seed=size, **kind) for size in SIZES]
    # aligned tensors, then one that is not; 0-element tensors stay among them
    skips = [0] * len(sources) + [1]
    sources.append(pair(300, base, inst, seed=5, **kind))
    bases = [on_device(b, skip) for (b, _), skip in zip(sources, skips)]
    insts = [on_device(i, skip) for (_, i), skip in zip(sources, skips)]
    live = [
        on_device(torch.full(b.shape, 9.0, dtype=out), skip) for (b, _), skip in zip(sources, skips)
    ]
    lerp = Lerp(live, bases, insts, [intermediate] * len(live))
    for lam in lams:
        lerp.run_(lam)
        for w, (b, i) in zip(live, sources):
            expected = reference.lerp(b, i, lam, out, intermediate)
            assert same(w, expected), (lam, w.shape)
            if out == base == inst and intermediate is None:
                kept = (bits(b) == bits(i)) | (lam in (0.0, 1.0))
                assert torch.equal(bits(w)[kept], bits(expected)[kept]), (lam, w.shape)


# either side of 1/2, and all between, is the same code for each dtype
SOME = [d for d in reference.LIVE_DTYPES if d != torch.bfloat16] if INTERPRETED else []


@fused
@pytest.mark.parametrize(
    ("dtype", "lams"),
    [
        *((dtype, (*LAMBDAS[::3], 0.5, 0.0, 1.0)) for dtype in SOME),
        *(
            pytest.param(dtype, LAMBDAS, marks=[pytest.mark.slow] if dtype in SOME else [])
            for dtype in reference.LIVE_DTYPES
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else f"{len(value)} λ",
)
def test_lerp_of_one_dtype(dtype: torch.dtype, lams: tuple[float, ...]) -> None:
    check(dtype, dtype, dtype, lams)


@fused
@pytest.mark.parametrize(("out", "base", "inst"), sampled(MIXES, 3), ids=str)
def test_lerp_of_mixed_dtypes(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    check(out, base, inst, (0.0, 0.05, 0.6, 1.0, 1.5))


@fused
@pytest.mark.parametrize("intermediate", [torch.bfloat16, torch.float16], ids=str)
def test_lerp_with_an_intermediate_dtype(intermediate: torch.dtype) -> None:
    check(torch.float32, torch.float32, intermediate, (0.0, 0.05, 0.6, 1.0), intermediate)
    check(torch.float32, torch.float32, torch.float32, (0.0, 0.3), intermediate)


@fused
@pytest.mark.parametrize(("out", "base", "inst"), sampled([*TRIPLES[::13], TRIPLES[1]], 3), ids=str)
def test_lerp_of_non_finite_sources(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    check(out, base, inst, (0.0, 0.3, 0.6, 1.0, -0.2), finite=False)


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_lerp_where_products_are_exact(dtype: torch.dtype) -> None:
    # nothing patched: λ and data are short enough that even the interpreter's fma is right
    generator = torch.Generator().manual_seed(3)
    b, i = (
        torch.randint(-128, 129, (BLOCK + 70,), generator=generator).div(64).to(dtype)
        for _ in range(2)
    )
    w = on_device(torch.zeros_like(b))
    for step in (0, 1, 77, 127, 128, 129, 255, 256, 300, -40):
        lerp_([w], [on_device(b)], [on_device(i)], step / 256)
        assert torch.equal(bits(w), bits(reference.lerp(b, i, step / 256))), step


DRAWN = [triple for triple in TRIPLES if triple[0] != torch.float32]
STARTS = {
    0: 0,
    DRAW_STEP: 1,
    2**32 - DRAW_STEP: 300,
    2**32: 2 * BLOCK + 100,
    2**40 + DRAW_STEP: 300,
}
"""Where tensors start in the noise, and their sizes."""


def check_drawn(
    out: torch.dtype,
    base: torch.dtype,
    inst: torch.dtype,
    lams: tuple[float, ...],
    intermediate: torch.dtype | None = None,
    **kind: Any,
) -> None:
    sources = [pair(size, base, inst, seed=size, **kind) for size in STARTS.values()]
    # the last one is misaligned, so that it takes the loop of tails
    skips = [0] * (len(STARTS) - 1) + [1]
    draws = [Draw(0x9E3779B9 ^ t, start) for t, start in enumerate(STARTS)]
    bases = [on_device(b, skip) for (b, _), skip in zip(sources, skips)]
    insts = [on_device(i, skip) for (_, i), skip in zip(sources, skips)]
    live = [
        on_device(torch.full(b.shape, 9.0, dtype=out), skip) for (b, _), skip in zip(sources, skips)
    ]
    lerp = Lerp(live, bases, insts, [intermediate] * len(live), draws)
    for lam in lams:
        lerp.run_(lam)
        for w, (b, i), draw in zip(live, sources, draws):
            expected = reference.lerp(b, i, lam, out, intermediate, draw)
            assert same(w, expected), (lam, w.shape)
            if out == base == inst and intermediate is None:
                kept = (bits(b) == bits(i)) | (lam in (0.0, 1.0))
                assert torch.equal(bits(w)[kept], bits(expected)[kept]), (lam, w.shape)


@fused
@pytest.mark.parametrize(("out", "base", "inst"), sampled(DRAWN[::2], 2), ids=str)
def test_stochastic_rounding(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    check_drawn(out, base, inst, (0.0, 0.05, 0.6, 1.0))


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_twice_and_of_non_finite_and_of_large_weights(
    dtype: torch.dtype,
) -> None:
    check_drawn(torch.float32, torch.float32, dtype, (0.0, 0.3, 1.0), dtype)
    check_drawn(dtype, dtype, dtype, (0.0, 0.3, 1.0), finite=False)
    check_drawn(dtype, dtype, dtype, (LARGE,))


LARGE = 1e38
"""A λ that takes a weight to the largest number of its dtype, and past it."""


def test_stochastic_rounding_where_products_are_exact() -> None:
    # nothing patched, as for the lerp
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.bfloat16, torch.float16):
        b, i = (
            torch.randint(-128, 129, (BLOCK + 70,), generator=generator).div(64).to(dtype)
            for _ in range(2)
        )
        w = on_device(torch.zeros_like(b))
        for step in (0, 1, 77, 127, 128, 129, 255, 256, 300, -40):
            lerp_([w], [on_device(b)], [on_device(i)], step / 256, draws=[Draw(77)])
            assert torch.equal(bits(w), bits(reference.lerp(b, i, step / 256, draw=Draw(77)))), step


@fused
def test_tensors_with_and_without_noise_beside_each_other() -> None:
    sources = [pair(700, torch.bfloat16, torch.bfloat16, seed) for seed in range(4)]
    draws = [None, Draw(1), None, Draw(2)]
    live = [on_device(torch.zeros(700, dtype=torch.bfloat16)) for _ in sources]
    lams = [0.1, 0.2, 0.3, 0.4]
    lerp = Lerp(
        live, [on_device(b) for b, _ in sources], [on_device(i) for _, i in sources], draws=draws
    )
    assert len(lerp.groups) == 2
    lerp.run_(lams)
    for w, (b, i), lam, draw in zip(live, sources, lams, draws):
        assert same(w, reference.lerp(b, i, lam, draw=draw))


@fused
def test_a_lambda_for_each_tensor_and_every_dtype_at_once() -> None:
    sources = [
        (out, *pair(700, base, inst, seed)) for seed, (out, base, inst) in enumerate(TRIPLES[::5])
    ]
    live = [on_device(torch.zeros(700, dtype=out)) for out, _, _ in sources]
    lams = [0.0, 0.3, 1.0, 1.5, 0.25, -0.1][: len(live)]
    lerp = Lerp(live, [on_device(b) for _, b, _ in sources], [on_device(i) for _, _, i in sources])
    assert sorted(t for group in lerp.groups for t in group.entries) == list(range(len(live)))
    lerp.run_(lams)
    for w, (out, b, i), lam in zip(live, sources, lams):
        assert same(w, reference.lerp(b, i, lam, out)), lam


@fused
def test_lerp_writes_nothing_beside_its_tensors() -> None:
    for size in (1, 5, BLOCK, BLOCK + 3):
        b, i = pair(size, torch.bfloat16, torch.bfloat16)
        storage = torch.full((size + 64,), 7.0, dtype=torch.bfloat16, device=DEVICE)
        lerp_([storage[32 : 32 + size]], [on_device(b)], [on_device(i)], 0.3)
        assert bool((storage[:32] == 7).all()) and bool((storage[32 + size :] == 7).all())
        assert torch.equal(bits(storage[32 : 32 + size]), bits(reference.lerp(b, i, 0.3)))


def test_checksum() -> None:
    chunk = reference.CHUNK_WORDS * 8
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(
        0, 256, (2 * chunk + 3 * BLOCK + 5,), dtype=torch.uint8, generator=generator
    )
    cuts = [
        data,
        data[:0],
        data[:1],
        data[:8],
        data[:100],
        data[chunk : 2 * chunk],
        data[3:10_000],
        data[8 : 8 + chunk // 4],
    ]
    expected = [reference.checksum(cut) for cut in cuts]
    assert checksum([on_device(cut) for cut in cuts]) == expected
    small = [2, 3, 4, 7]
    assert checksum([on_device(cuts[t], 1) for t in small]) == [expected[t] for t in small]


def test_checksum_of_weights_and_words_with_the_top_bit() -> None:
    weights = -torch.rand(9001).bfloat16()
    ones = torch.full((5000,), -1, dtype=torch.int64)
    assert checksum([on_device(weights), on_device(ones)]) == [
        reference.checksum(weights),
        reference.checksum(ones),
    ]


KINDS = ("index", "bitmap")
LISTED = {
    "index": ((0, 0.1), (5, 1.0), (4096, 0.0), (70_000, 0.02), (131_072, 0.0002)),
    "bitmap": ((0, 0.1), (5, 1.0), (4096, 0.0), (9000, 0.3)),
}
"""Sizes and densities: no tile, parts of one, several; tiles with nothing, less than a vector, and
several blocks."""


def sparse_on_device(entry: SparseTensor, skip: int = 0) -> SparseTensor:
    names = ("where", "starts", "base", "target")
    return replace(entry, **{name: on_device(getattr(entry, name), skip) for name in names})


def check_sparse(
    out: torch.dtype,
    base: torch.dtype,
    inst: torch.dtype,
    lams: tuple[float, ...],
    intermediate: torch.dtype | None = None,
    **kind: Any,
) -> None:
    entries = [
        sparse(size, base, inst, p, k, seed=size, **kind) for k in KINDS for size, p in LISTED[k]
    ]
    # again, where nothing is aligned
    entries += [sparse(66_000, base, inst, 0.004, "index", **kind), entries[-1]]
    skips = [0] * (len(entries) - 2) + [1] * 2
    storages = [torch.full((entry.numel + 64,), 7.0, dtype=out, device=DEVICE) for entry in entries]
    live = [
        storage[16 + skip : 16 + skip + entry.numel]
        for storage, entry, skip in zip(storages, entries, skips)
    ]
    prepared = Sparse(
        live,
        [sparse_on_device(*pair) for pair in zip(entries, skips)],
        [intermediate] * len(entries),
    )
    for lam in lams:
        prepared.run_(lam)
        for storage, entry, skip in zip(storages, entries, skips):
            expected = torch.full((entry.numel + 64,), 7.0, dtype=out)
            at = slice(16 + skip, 16 + skip + entry.numel)
            expected[at] = sparsely_set(expected[at], entry, lam, intermediate)
            assert same(storage, expected), (lam, entry.numel, entry.kind)


@fused
@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_sparse_of_one_dtype(dtype: torch.dtype) -> None:
    # how a merge branches on λ is the same code for each dtype
    every = not INTERPRETED or dtype == torch.bfloat16
    check_sparse(dtype, dtype, dtype, (0.0, 0.3, 1.0, 1.5) if every else (0.3, 1.0))


@fused
@pytest.mark.parametrize(("out", "base", "inst"), MIXES[::5], ids=str)
def test_sparse_of_mixed_dtypes(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    check_sparse(out, base, inst, (0.0, 0.6))


@fused
def test_sparse_with_an_intermediate_dtype_and_non_finite() -> None:
    check_sparse(torch.float32, torch.float32, torch.bfloat16, (0.6, 1.0), torch.bfloat16)
    check_sparse(torch.bfloat16, torch.bfloat16, torch.bfloat16, (0.3, 1.0), finite=False)


def test_sparse_where_products_are_exact() -> None:
    # nothing patched, as for the lerp
    generator = torch.Generator().manual_seed(3)
    b, d = (
        torch.randint(-128, 129, (900,), generator=generator).div(64).bfloat16() for _ in range(2)
    )
    for kind in KINDS:
        entry = SparseTensor.encode(torch.arange(900) * 11, b, d, 10_000, kind=kind)
        w = torch.zeros(10_000, dtype=torch.bfloat16, device=DEVICE)
        for step in (0, 77, 128, 255, 256, -40):
            sparse_set_([w], [sparse_on_device(entry)], step / 256)
            assert same(
                w, sparsely_set(torch.zeros(10_000, dtype=torch.bfloat16), entry, step / 256)
            ), step


@fused
def test_sparse_groups_by_dtypes_and_kind_with_a_lambda_for_each() -> None:
    entries = [
        sparse(5000, base, inst, 0.05, kind, seed=7)
        for _, base, inst in TRIPLES[::9]
        for kind in KINDS
    ]
    live = [torch.ones(5000, dtype=out, device=DEVICE) for out, _, _ in TRIPLES[::9] for _ in KINDS]
    prepared = Sparse(live, [sparse_on_device(entry) for entry in entries])
    assert len(prepared.groups) == len(entries)
    assert sorted(t for group in prepared.groups for t in group.entries) == list(
        range(len(entries))
    )
    lams = [0.0, 0.3, 1.0, 1.5, 0.25, -0.1]
    prepared.run_(lams)
    for w, entry, lam in zip(live, entries, lams):
        assert same(w, sparsely_set(torch.ones(5000, dtype=w.dtype), entry, lam)), lam


# --- what a recorded switch says of what it wrote


RECORDED_SIZES = (0, 1, 300, 2 * BLOCK + 100)
"""The last has the only whole tiles: of 16 bits one, of fp32 two."""


def check_recorded(
    triples: list[tuple[torch.dtype, torch.dtype, torch.dtype]],
    lams: tuple[float, ...],
    skip: int = 0,
    finite: bool = True,
    **options: Any,
) -> None:
    # whatever is misaligned takes the loop of tails, where it is
    sizes = RECORDED_SIZES[:-1] if skip else RECORDED_SIZES
    sides = [pair(n, b, i, seed=n, finite=finite) for _, b, i in triples for n in sizes]
    outs = [on_device(torch.empty(n, dtype=o), skip) for o, _, _ in triples for n in sizes]
    bases, insts = ([on_device(side, skip) for side in column] for column in zip(*sides))
    options = {name: [value] * len(outs) for name, value in options.items()}
    recorded = Lerp(outs, bases, insts, records=True, **options)
    plain = [torch.empty_like(out) for out in outs]
    for lam in lams:
        recorded.run_(lam)
        lerp_(plain, bases, insts, lam, **options)
        for w, expected, b, i, written in zip(outs, plain, bases, insts, recorded.written()):
            assert same(w, expected), (lam, w.dtype, b.dtype, i.dtype, w.numel())
            assert written.checksum == reference.checksum(w)
            w, b, i = (side.cpu().double() for side in (w, b, i))
            if not bool((w + b + i).isfinite().all()):
                continue
            moved, distance = ((w - b) * (i - b)).sum(), (i - b).square().sum()
            near = 1e-6 * float(distance) + 1e-12
            assert written.products == pytest.approx((float(moved), float(distance)), 0, near)


EXACT = (0.25, -0.25, 0.625, 1.5, 0.0, 1.0)
"""λ whose products are exact, which the interpreter's fma needs: either side of the sources, near
either, and both."""


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("dtype", [*reference.LIVE_DTYPES], ids=str)
def test_recorded_switch(dtype: torch.dtype, skip: int) -> None:
    check_recorded([(dtype,) * 3], EXACT[3:] if skip else EXACT, skip)


@pytest.mark.parametrize(("out", "base", "inst"), sampled(MIXES, 8))
def test_recorded_switch_of_mixed_dtypes(
    out: torch.dtype, base: torch.dtype, inst: torch.dtype
) -> None:
    check_recorded([(out, base, inst)], EXACT[:4])


def test_recorded_switch_of_non_finite_sources() -> None:
    check_recorded([(torch.bfloat16,) * 3], (0.25, 1.0), finite=False)


def test_recorded_switch_with_noise_and_through_another_dtype() -> None:
    check_recorded([(torch.bfloat16,) * 3], (0.25, 0.0), draws=Draw(7))
    mixed = (torch.float32, torch.float32, torch.bfloat16)
    check_recorded([mixed], (0.25, 1.0), intermediate_dtypes=torch.bfloat16)


@fused
def test_recorded_switch_at_any_lambda() -> None:
    check_recorded([(torch.bfloat16,) * 3], (0.05, 1 / 3, 0.6, 0.999))


def test_sums_of_products_are_the_same_each_time() -> None:
    b, i = (on_device(side) for side in pair(9 * BLOCK + 5, torch.bfloat16, torch.bfloat16))
    lerp = Lerp([torch.empty_like(b)], [b], [i], records=True)
    lerp.run_(0.25)
    (first,) = lerp.written()
    for lam in (0.5, 0.25):
        lerp.run_(lam)
    assert lerp.written() == [first]

"""The CPU paths against the reference: every dtype mix, odd sizes, odd places, and everything that
is refused."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pa_kernels import Lerp, lerp_, reference
from pa_kernels.dense import CHUNK
from torch import Tensor

from tests.kernels.pairs import LAMBDAS, TRIPLES, bits, pair, same

LERP = "pa_kernels.dense"
SIZES = (0, 1, 3, 17, 255, 4096)


def blank(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype)


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES, ids=str)
def test_every_dtype_triple(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    sources = [pair(size, base, inst, seed=size) for size in SIZES] + [
        pair(1001, base, inst, skip=3)
    ]
    bases, insts = zip(*sources)
    once, prepared = ([blank(b, out) for b in bases] for _ in range(2))
    lerp = Lerp(prepared, bases, insts)
    for lam in LAMBDAS:
        lerp_(once, bases, insts, lam)
        lerp.run_(lam)
        for t, (b, i) in enumerate(sources):
            expected = reference.lerp(b, i, lam, out)
            assert torch.equal(bits(once[t]), bits(expected)), (lam, t)
            assert torch.equal(bits(prepared[t]), bits(expected)), (lam, t)


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES[::6], ids=str)
def test_more_than_one_piece(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    b, i = pair(2 * CHUNK + 1001, base, inst)
    once, prepared = blank(b, out), blank(b, out)
    for lam in (0.0, 0.3, 0.6):
        lerp_([once], [b], [i], lam)
        Lerp([prepared], [b], [i]).run_(lam)
        expected = reference.lerp(b, i, lam, out)
        assert torch.equal(bits(once), bits(expected)), lam
        assert torch.equal(bits(prepared), bits(expected)), lam


@pytest.mark.parametrize("intermediate", reference.LIVE_DTYPES, ids=str)
@pytest.mark.parametrize("out", reference.LIVE_DTYPES, ids=str)
def test_an_intermediate_dtype(out: torch.dtype, intermediate: torch.dtype) -> None:
    b, i = pair(5000, torch.float32, torch.bfloat16)
    w = blank(b, out)
    for lam in (0.0, 0.05, 0.6, 1.0):
        for run in (
            lambda lam=lam: lerp_([w], [b], [i], lam, intermediate_dtypes=[intermediate]),
            lambda lam=lam: Lerp([w], [b], [i], [intermediate]).run_(lam),
        ):
            w.fill_(math.nan)
            run()
            assert torch.equal(bits(w), bits(reference.lerp(b, i, lam, out, intermediate)))


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES, ids=str)
def test_non_finite_sources(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    b, i = pair(9000, base, inst, finite=False)
    w = blank(b, out)
    for lam in (0.0, 0.3, 0.6, 1.0, -0.2):
        for run in (lerp_, lambda w, b, i, lam: Lerp(w, b, i).run_(lam)):
            run([w], [b], [i], lam)
            expected = reference.lerp(b, i, lam, out)
            assert same(w, expected), lam
            if out == base == inst:
                equal = bits(b) == bits(i)
                assert torch.equal(bits(w)[equal], bits(b)[equal]), lam


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_one_special_place_in_a_large_tensor(dtype: torch.dtype) -> None:
    size = CHUNK + 1000
    for value in (-0.0, math.inf, -math.inf, math.nan):
        for place in (0, CHUNK, size - 1):
            b, i = torch.full((size,), 0.5, dtype=dtype), torch.full((size,), 0.75, dtype=dtype)
            b[place] = i[place] = value
            w = blank(b, dtype)
            Lerp([w], [b], [i]).run_(0.3)
            expected = reference.lerp(b[1:2], i[1:2], 0.3).repeat(size)
            expected[place] = value
            assert torch.equal(bits(w), bits(expected)), (value, place)


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_no_history(dtype: torch.dtype) -> None:
    b, i = pair(3001, dtype, dtype)
    w = blank(b, dtype)
    lerp = Lerp([w], [b], [i])
    address = w.data_ptr()
    for lam in [*LAMBDAS, *reversed(LAMBDAS), 0.7]:
        lerp.run_(lam)
        assert torch.equal(bits(w), bits(reference.lerp(b, i, lam)))
    assert w.data_ptr() == address


def test_a_lambda_for_each_tensor() -> None:
    sources = [pair(500, torch.bfloat16, torch.bfloat16, seed) for seed in range(4)] + [
        pair(77, torch.float32, torch.float16)
    ]
    bases, insts = zip(*sources)
    lams = [0.0, 0.3, 1.0, 1.5, 0.25]
    for run in (lambda w: lerp_(w, bases, insts, lams), lambda w: Lerp(w, bases, insts).run_(lams)):
        out = [blank(i, i.dtype) for i in insts]
        run(out)
        for w, b, i, lam in zip(out, bases, insts, lams):
            assert torch.equal(bits(w), bits(reference.lerp(b, i, lam)))


def test_launch_reads_the_lambda_table() -> None:
    b, i = pair(500, torch.bfloat16, torch.bfloat16)
    w = blank(b, b.dtype)
    lerp = Lerp([w], [b], [i])
    (group,) = lerp.groups
    assert group.entries == (0,)
    group.lams.fill_(0.3)
    lerp.launch_()
    assert torch.equal(bits(w), bits(reference.lerp(b, i, 0.3)))


@settings(max_examples=80)
@given(
    st.sampled_from(TRIPLES),
    st.lists(st.tuples(st.floats(width=16), st.floats(width=16)), min_size=1, max_size=70),
    st.floats(-4, 4, width=32),
)
def test_hypothesis(
    triple: tuple[torch.dtype, torch.dtype, torch.dtype],
    values: list[tuple[float, float]],
    lam: float,
) -> None:
    out, base, inst = triple
    b = torch.tensor([x for x, _ in values], dtype=base)
    i = torch.tensor([y for _, y in values], dtype=inst)
    w = blank(b, out)
    lerp_([w], [b], [i], lam)
    assert same(w, reference.lerp(b, i, lam, out))
    Lerp([w], [b], [i]).run_(lam)
    assert same(w, reference.lerp(b, i, lam, out))


@pytest.mark.parametrize(("out", "base", "inst"), TRIPLES[::4], ids=str)
def test_without_an_exact_torch_lerp(
    out: torch.dtype, base: torch.dtype, inst: torch.dtype
) -> None:
    b, i = pair(150_000, base, inst)
    w = blank(b, out)
    with (
        mock.patch(f"{LERP}.torch_lerp_is_exact", lambda *_: False),
        mock.patch("torch.lerp", side_effect=AssertionError),
    ):
        for lam in (0.0, 0.3, 1.0):
            lerp_([w], [b], [i], lam)
            assert torch.equal(bits(w), bits(reference.lerp(b, i, lam, out)))
            w.fill_(math.nan)
            Lerp([w], [b], [i]).run_(lam)
            assert torch.equal(bits(w), bits(reference.lerp(b, i, lam, out)))


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_the_probe_notices_a_lerp_without_fused_multiply_add(dtype: torch.dtype) -> None:
    from pa_kernels.dense import torch_lerp_is_exact

    def unfused(b: Tensor, i: Tensor, lam: float) -> Tensor:
        x, y, weight = b.float(), i.float(), torch.tensor(lam)
        return (x + weight * (y - x) if abs(lam) < 0.5 else y - (y - x) * (1 - weight)).to(b.dtype)

    def truncating(b: Tensor, i: Tensor, lam: float) -> Tensor:
        exact = reference.lerp(b, i, lam, torch.float32)
        return torch.nextafter(exact, torch.zeros(())).to(b.dtype)

    probe = torch_lerp_is_exact.__wrapped__
    with mock.patch("torch.lerp", truncating):
        assert not probe(dtype)
    if dtype == torch.float32:
        with mock.patch("torch.lerp", unfused):
            assert not probe(dtype)


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_the_probe_takes_a_lerp_that_is_right_wherever_it_is_used(dtype: torch.dtype) -> None:
    from pa_kernels.dense import torch_lerp_is_exact

    def exact(b: Tensor, i: Tensor, lam: float) -> Tensor:
        merged = reference.lerp(b, i, lam)
        # +0 of two −0, NaN of two infinities, as torch makes them
        return torch.where(b.isfinite(), merged + 0.0, torch.nan)

    with mock.patch("torch.lerp", exact):
        assert torch_lerp_is_exact.__wrapped__(dtype)


def test_flushed_denormals_are_refused() -> None:
    b, i = pair(100, torch.float32, torch.float32)
    lerp = Lerp([b.clone()], [b], [i])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            lerp.run_(0.3)
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            lerp_([b.clone()], [b], [i], 0.3)
    finally:
        torch.set_flush_denormal(False)
    lerp.run_(0.3)


def test_parameters_and_inference_tensors() -> None:
    b, i = pair(1000, torch.float32, torch.float32)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    with torch.inference_mode():
        frozen = torch.zeros(1000)
    expected = reference.lerp(b, i, 0.3)
    lerp = Lerp([parameter, frozen], [b, b], [i, torch.nn.Parameter(i)])
    lerp.run_(0.3)
    assert torch.equal(parameter.detach(), expected)
    assert torch.equal(frozen, expected)
    assert parameter.requires_grad
    with torch.inference_mode():
        inside = Lerp([parameter], [b], [i])
    inside.run_(0.6)
    assert torch.equal(parameter.detach(), reference.lerp(b, i, 0.6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": [torch.zeros(2, 3)]}, ValueError, "1 live tensors, 2 base"),
        (
            {"base": [torch.zeros(2, 3), torch.zeros(3, 2)]},
            ValueError,
            r"entry 1: base has shape \(3, 2\), the live tensor \(2, 3\)",
        ),
        (
            {"inst": [torch.zeros(2, 3).long(), torch.zeros(2, 3)]},
            TypeError,
            "entry 0: instruct is torch.int64, expected",
        ),
        ({"inst": ["x", torch.zeros(2, 3)]}, TypeError, "entry 0: instruct is str, expected"),
        (
            {"out": [torch.zeros(2, 3), torch.zeros(3, 2).t()]},
            ValueError,
            r"entry 1: live has strides \(1, 2\)",
        ),
        (
            {"base": [torch.zeros(2, 3), torch.zeros(2, 3, device="meta")]},
            ValueError,
            "entry 1: base is on meta, the live tensor on cpu",
        ),
        (
            {"intermediate_dtypes": [torch.float64, None]},
            TypeError,
            "entry 0: intermediate_dtype is torch.float64",
        ),
        ({"lam": math.nan}, ValueError, "λ is nan"),
        ({"lam": 1e39}, ValueError, "finite in fp32"),
        ({"lam": [0.5]}, ValueError, "1 λ for 2 tensors"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    given = {
        "out": [torch.zeros(2, 3)] * 2,
        "base": [torch.zeros(2, 3)] * 2,
        "inst": [torch.zeros(2, 3)] * 2,
        "lam": 0.5,
        "intermediate_dtypes": None,
    }
    given |= change
    with pytest.raises(error, match=message):
        lerp_(
            given["out"],
            given["base"],
            given["inst"],
            given["lam"],
            intermediate_dtypes=given["intermediate_dtypes"],
        )
    with pytest.raises(error, match=message):
        Lerp(given["out"], given["base"], given["inst"], given["intermediate_dtypes"]).run_(
            given["lam"]
        )


def test_no_tensors() -> None:
    lerp_([], [], [], 0.5)
    Lerp([], [], []).run_(0.5)
    with pytest.raises(ValueError, match="finite"):
        lerp_([], [], [], math.inf)

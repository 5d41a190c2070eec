"""Loops that numba compiles: the bits of torch's way, sums included, or no loops."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pa_kernels
import pytest
import torch
from pa_kernels import Lerp, checksum, compiled, dense, reference
from pa_kernels.projection import projection

from tests.kernels.pairs import LAMBDAS, TRIPLES, pair, same

SIZES = (0, 1, 3, 1023, 1024, 33_000)


@pytest.fixture(scope="module")
def loops() -> compiled.Loops:
    pytest.importorskip("numba", reason="numba is not installed")
    made = compiled.loops()
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("skip", "dtypes"),
    [
        *((0, dtypes) for dtypes in (TRIPLES[0], TRIPLES[1], TRIPLES[-1])),
        # what starts at an odd place
        (1, TRIPLES[0]),
        *(pytest.param(1, dtypes, marks=pytest.mark.slow) for dtypes in (TRIPLES[1], TRIPLES[-1])),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("steps", "most", "lams"),
    [
        # of steps as they are, with a tensor that torch's way takes two of; and at every λ, where
        # both ways take several
        ((dense.RECORDED, dense.SUMMED), 600_001, (*LAMBDAS[::4], 0.0, 1.0)),
        ((1 << 16, 1 << 15), 150_001, LAMBDAS),
    ],
    ids=["usual", "small steps"],
)
def test_recorded_switches_are_the_reference_and_alike(
    dtypes: tuple[torch.dtype, ...],
    skip: int,
    steps: tuple[int, int],
    most: int,
    lams: tuple[float, ...],
    loops: compiled.Loops,
    ready: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, step in zip(("RECORDED", "SUMMED"), steps):
        monkeypatch.setattr(dense, name, step)
    assert most > steps[1]
    out, *sources = dtypes
    sizes = (*SIZES, most)
    sides = [pair(n, *sources, seed=n, skip=skip) for n in sizes]
    bases, insts = (list(column) for column in zip(*sides))
    live = [torch.empty(n + skip, dtype=out)[skip:] for n in sizes]
    lerp = Lerp(live, bases, insts, records=True)
    for lam in lams:
        expected = [reference.lerp(b, i, lam, out) for b, i in sides]
        found = []
        for has in ([], [loops]):
            ready[:] = has
            for w in live:
                w.fill_(9)
            lerp.run_(lam)
            found.append(repr(lerp.written()))
            for w, one, wanted in zip(live, lerp.written(), expected):
                assert same(w, wanted), (lam, w.numel(), bool(has))
                assert one.checksum == reference.checksum(w)
        assert found[0] == found[1], lam


@pytest.mark.parametrize("count", (*SIZES, 600_001))
def test_checksums_and_products_are_alike(
    count: int, loops: compiled.Loops, ready: list[Any]
) -> None:
    b, i = pair(count, torch.bfloat16, torch.bfloat16, finite=True)
    w = torch.lerp(b, i, 0.3)
    plain = projection(w, b, i), checksum([w]), checksum([w], 1)
    ready.append(loops)
    assert (projection(w, b, i), checksum([w]), checksum([w], 1)) == plain
    assert plain[1:] == ([reference.checksum(w)], [reference.checksum(w, 1)])
    expected = float(((w.double() - b.double()) * (i.double() - b.double())).sum())
    assert plain[0] == pytest.approx(expected, 1e-6)


def test_they_are_loaded_where_it_is_worth_it(loops: compiled.Loops, ready: list[Any]) -> None:
    compiled.prepare(compiled.WORTH_BYTES - 1)
    assert compiled.ready() is None
    compiled.prepare(compiled.WORTH_BYTES)
    assert compiled.ready() == loops


def test_wrong_bits_or_sums_are_refused(loops: compiled.Loops) -> None:
    assert compiled._is_exact(loops)

    def truncated(w: Any, b: Any, i: Any, weight: Any, base_near: bool, *factors: Any) -> Any:
        total, moved = loops.lerp_(w, b, i, weight, base_near, *factors)
        w[0] ^= 1
        return total, moved

    def twice_rounded(w: Any, b: Any, i: Any, weight: Any, base_near: bool, *factors: Any) -> Any:
        wide = [(side.astype(np.uint32) << 16).view(np.float32) for side in (b, i)]
        product = (weight * (wide[1] - wide[0])).astype(np.float32)
        sums = torch.from_numpy(product + wide[0 if base_near else 1]).bfloat16()
        w[:] = sums.view(torch.int16).numpy()
        return reference.checksum(sums), loops.products(w, b, i, 0.0)

    for lerp_ in (truncated, twice_rounded):
        assert not compiled._is_exact(replace(loops, lerp_=lerp_))
    assert not compiled._is_exact(replace(loops, checksum=lambda *_: 0))
    assert not compiled._is_exact(replace(loops, products=lambda *_: 0.0))


def test_without_numba_there_are_none(monkeypatch: pytest.MonkeyPatch, ready: list[Any]) -> None:
    monkeypatch.setitem(sys.modules, "pa_kernels.compiled_loops", None)  # its import fails
    monkeypatch.delattr(pa_kernels, "compiled_loops", raising=False)
    assert compiled.loops.__wrapped__() is None

"""Pairs of source tensors for kernel tests: ordinary weights with every special case sprinkled
among them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pa_kernels import SparseTensor, reference
from pa_kernels.dense import torch_lerp_is_exact
from pa_kernels.reference import MANTISSA, largest
from pa_kernels.sparse import SparseKind
from torch import Tensor

LAMBDAS = (
    -2.3,
    -0.2,
    0.05,
    0.3,
    1 / 3,
    math.nextafter(0.5, 0),
    0.49999997,
    0.5,
    0.50000006,
    0.6,
    0.999,
    1.5,
    3.7,
    0.0,
    1.0,
)
TRIPLES = list(itertools.product(reference.LIVE_DTYPES, repeat=3))
"""(out, base, inst), all of them."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def sampled(cases: Sequence[Any], every: int) -> list[Any]:
    """Parameters of a kernel body's test: all of `cases`, of which the interpreter leaves all but
    one in `every` to the slow tests. The interpreter takes seconds for what a GPU does in none."""
    return [
        case if k % every == 0 or not INTERPRETED else pytest.param(*case, marks=pytest.mark.slow)
        for k, case in enumerate(cases)
    ]


def elements(count: int) -> int:
    """Elements of a test that a GPU is to have `count` of: at most a few tiles, and the same tail,
    where kernels are interpreted."""
    return min(count, 2 * 2048 + count % 2048) if INTERPRETED else count


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().view(reference.BITS[tensor.dtype])


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit equality, except that one NaN is as good as another where the contract leaves them open
    (`reference.lerp`)."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    return found.dtype == expected.dtype and bool(
        ((bits(found) == bits(expected)) | (found.isnan() & expected.isnan())).all()
    )


def pair(
    size: int,
    base: torch.dtype,
    inst: torch.dtype,
    seed: int = 0,
    finite: bool = True,
    skip: int = 0,
) -> tuple[Tensor, Tensor]:
    """Base and instruct of `size` elements that start `skip` elements into their storage.

    A few per cent of the places hold equal bits, −0 on both sides or on one, subnormals, or (unless
    `finite`) infinities and NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(size + skip, generator=generator) * 0.02
    i = b * (1 + 0.05 * torch.randn(size + skip, generator=generator))
    b, i = b.to(base), i.to(inst)
    kind = torch.randint(0, 60, (size + skip,), generator=generator)
    i[kind == 0] = b[kind == 0].to(inst)
    for at, x, y in (
        (1, -0.0, -0.0),
        (2, -0.0, 0.0),
        (3, 0.0, -0.0),
        (4, -0.0, 0.5),
        (5, 0.5, -0.0),
        (6, 6e-8, -3e-8),
        (7, 1e-40, -2e-40),
    ):
        b[kind == at], i[kind == at] = x, y
    if not finite:
        inf, nan = math.inf, math.nan
        for at, x, y in (
            (10, inf, inf),
            (11, -inf, -inf),
            (12, inf, -inf),
            (13, 1.0, inf),
            (14, nan, nan),
            (15, nan, 1.0),
            (16, 1.0, nan),
        ):
            b[kind == at], i[kind == at] = x, y
    return b[skip:], i[skip:]


def at_powers_of_two(
    dtype: torch.dtype, reach: int, exponents: range | None = None
) -> tuple[Tensor, Tensor]:
    """Every pair of patterns within `reach` of each power of two, either sign: from the subnormals
    to the largest number.

    Args:
        exponents: exponent fields of these powers of two; all of them where None.
    """
    h, top = MANTISSA[dtype], largest(dtype)
    near = torch.arange(-reach, reach + 1)
    powers = torch.tensor(exponents or range((top >> h) + 2)) << h
    b, i = (side.reshape(-1) for side in torch.broadcast_tensors(near[:, None], near))
    b, i = ((powers[:, None] + side).view(-1) for side in (b, i))
    inside = (b.clamp(0, top) == b) & (i.clamp(0, top) == i)
    return tuple(  # type: ignore[return-value]
        torch.cat([side[inside], side[inside] - 0x8000]).to(torch.int16).view(dtype)
        for side in (b, i)
    )


def fresh(b: Tensor, i: Tensor, lam: float) -> Tensor:
    """W(λ) of finite sources of one dtype by `torch.lerp`, where this build's has the contract's
    bits."""
    if not torch_lerp_is_exact(b.dtype):
        return reference.lerp(b, i, lam)
    return torch.where(
        reference.same_bits(b, i) | (lam == 0.0), b, i if lam == 1.0 else torch.lerp(b, i, lam)
    )


def sparse(
    size: int,
    base: torch.dtype,
    inst: torch.dtype,
    density: float,
    kind: SparseKind | None = None,
    seed: int = 0,
    finite: bool = True,
) -> SparseTensor:
    """A delta at random positions of a tensor of `size` elements, with the values of a `pair`."""
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < density
    b, d = pair(int(mask.sum()), base, inst, seed, finite)
    return SparseTensor.encode(mask, b, d, size, kind=kind)


def sparsely_set(
    live: Tensor, entry: SparseTensor, lam: float, intermediate: torch.dtype | None = None
) -> Tensor:
    """What `live` becomes, by the reference."""
    expected = live.clone()
    reference.sparse_set_(expected, entry.positions(), entry.base, entry.target, lam, intermediate)
    return expected

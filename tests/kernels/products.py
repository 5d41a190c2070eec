"""Matrices with low-rank deltas for kernel tests, and how far a merge may be from the reference."""

from __future__ import annotations

import itertools

import torch
from pa_kernels import reference
from pa_kernels.cores import one_core
from torch import Tensor

from tests.kernels.pairs import bits

KINDS = list(itertools.product(reference.LIVE_DTYPES, repeat=3))
"""(out, base, factors), all of them."""

Matrix = tuple[Tensor, Tensor, Tensor]
"""Base, U, V."""


def matrix(
    shape: tuple[int, ...], rank: int, base: torch.dtype, factor: torch.dtype, seed: int = 0
) -> Matrix:
    """Weights with −0 among them and a delta of their size that is 0 in every seventh row."""
    generator = torch.Generator().manual_seed(seed)
    b = (torch.randn(shape, generator=generator) * 0.02).to(base)
    b.view(-1)[::11] = -0.0
    u = torch.randn(*shape[:-1], rank, generator=generator) * 0.1
    u[..., ::7, :] = 0
    v = torch.randn(*shape[:-2], rank, shape[-1], generator=generator) * 0.1
    return b, u.to(factor), v.to(factor)


def exact_matrix(
    shape: tuple[int, ...], rank: int, base: torch.dtype, factor: torch.dtype, seed: int = 0
) -> Matrix:
    """Numbers so short that UV, and λ·UV + B for λ = n/256, are exact in fp32 in any order."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randint(-128, 129, shape, generator=generator).div(64).to(base)
    b.view(-1)[::11] = -0.0
    u = torch.randint(-4, 5, (*shape[:-1], rank), generator=generator).div(8).to(factor)
    v = torch.randint(-4, 5, (*shape[:-2], rank, shape[-1]), generator=generator).div(8).to(factor)
    return b, u, v


def order(tensor: Tensor) -> Tensor:
    """Integers that count the values of a dtype in their order: neighbours differ by one, −0 and 0
    not at all."""
    pattern = bits(tensor).long()
    most = torch.iinfo(reference.BITS[tensor.dtype]).max
    return torch.where(pattern < 0, -(pattern & most), pattern)


def ulps(found: Tensor, expected: Tensor) -> Tensor:
    return (order(found) - order(expected)).abs()


def allowed(of: Matrix, lam: float, real: Tensor, grid: torch.dtype) -> Tensor:
    """How far from `real` = B + λ·UV a merge may be by the bound that `LowRank` states, before
    underflow, in fp64.

    Args:
        grid: the coarsest dtype that the result is rounded to.
    """
    _, u, v = of
    sums = abs(lam) * (u.shape[-1] + 1) * 2.0**-23 * (u.abs().double() @ v.abs().double())
    info = torch.finfo(grid)
    return sums + ((real.abs() + sums) * info.eps).clamp(min=info.smallest_normal * info.eps)


def near(found: Tensor, of: Matrix, lam: float, intermediate: torch.dtype | None = None) -> bool:
    """Whether `found` is as near to B + λ·UV, in fp64, as the bound that `LowRank` states."""
    b, u, v = of
    with one_core():  # hundreds of short steps, at each of which threads would wait for each other
        real = b.double() + reference.fp32(lam) * (u.double() @ v.double())
        grid = max(
            (found.dtype, intermediate or found.dtype), key=lambda dtype: torch.finfo(dtype).eps
        )
        apart = (found.detach().cpu().double() - real).abs()
        return bool((apart <= allowed(of, lam, real, grid)).all())

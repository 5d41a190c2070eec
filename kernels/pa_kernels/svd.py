"""The best low-rank picture of a delta: a truncated SVD of I − B by random projections, in passes
over blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pa_kernels.cores import one_core, over_cores
from pa_kernels.precision import full_precision
from pa_kernels.reference import LIVE_DTYPES

T = TypeVar("T")

POWER_ITERATIONS = 4
"""Passes back and forth. For random matrices, whose spectrum is the flattest there is to cut, of
384 to 2048 rows and ranks 8 to min(M, N)/3, the error was at most 0.7 % above the best of that
rank; with a fixed oversample of 16, 1.1 %, and with power 3, 2 and 1 then 1.9, 3.2 and 7.6 %. For
spectra that fall like 1/√k, 1/k or exponentially, at most 0.4 % (power 0: up to 127 %)."""


def oversampled(rank: int) -> int:
    """Directions followed beside the R wanted: the gap that a flat spectrum leaves grows with R,
    and so must they."""
    return 16 + rank // 8


EXACT_SHARE = 3
"""From min(M, N) / EXACT_SHARE on the projections cost as much as the exact SVD, which is taken
then."""

CPU_PIECE, GPU_PIECE = 1 << 20, 1 << 26
"""Elements of I − B that are multiplied at a time: on a CPU by one core, while its neighbours have
others. Pieces do not depend on how many cores there are, and so neither do the results."""


@dataclass(frozen=True)
class Truncated:
    """I − B ≈ U·diag(s)·V.

    Attributes:
        u, s, v: fp32 [M, R], [R], [R, N] on the sources' device; s falls and is never negative, the
            columns of U and the rows of V are orthonormal.
        energy: ‖I − B‖_F², in fp64.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    energy: float

    @property
    def captured(self) -> float:
        """Σ s², so that ‖I − B − USV‖_F² = energy − captured."""
        return float(self.s.double().square().sum())

    @property
    def relative_error(self) -> float:
        """‖I − B − USV‖_F / ‖I − B‖_F; 0 where the sources are equal. Under 10⁻³ it may be
        rounding."""
        return math.sqrt(max(0.0, 1 - self.captured / self.energy)) if self.energy else 0.0


def truncated_svd(
    base: Tensor,
    inst: Tensor,
    rank: int,
    *,
    power: int = POWER_ITERATIONS,
    oversample: int | None = None,
    seed: int = 0,
) -> Truncated:
    """The leading `rank` singular triplets of I − B.

    Args:
        base, inst: [M, N] on one device, CPU or GPU, of any mix of bf16, fp16 and fp32.
        rank: R ≤ min(M, N).
        power: power iterations; each narrows the gap to the best approximation, most of all for
            flat spectra.
        oversample: directions that are followed beside the R wanted; `oversampled(rank)` by
            default.
        seed: of the random start; the same on every device.

    Numerics:
        fp32, with the small factorisation in fp64. I − B is rounded to fp32 once per element.

    Cost:
        2·power + 2 products of 2·M·N·(R + oversample) operations, each of which reads both sources.
        Scratch: fp32 of 2·(M + N)·(R + oversample) elements and of three pieces per core. From R ≥
        min(M, N) / EXACT_SHARE on: the exact SVD, with I − B whole in fp32.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or the rank do not fit, or I − B is not
            finite.

    Source: N. Halko, P. Martinsson, J. Tropp, "Finding structure with randomness", SIAM Review
        53(2), 2011, algorithms 4.4 and 5.1.
    """
    oversample = oversampled(rank) if oversample is None else oversample
    _check(base, inst, rank, power, oversample)
    with torch.no_grad(), full_precision():
        delta = _Delta(base, inst)
        energy = delta.energy()
        if not math.isfinite(energy):
            raise ValueError("the difference of base and instruct is not finite")
        if EXACT_SHARE * rank >= min(delta.shape):
            u, s, v = torch.linalg.svd(delta.part(), full_matrices=False)
            return Truncated(
                u[:, :rank].contiguous(), s[:rank].clone(), v[:rank].contiguous(), energy
            )
        wide = min(rank + oversample, *delta.shape)
        start = torch.randn(delta.shape[1], wide, generator=torch.Generator().manual_seed(seed)).to(
            base.device
        )
        columns = _qr(delta.times(start))[0]
        for _ in range(power):
            rows = _qr(delta.transposed_times(columns))[0]
            columns = _qr(delta.times(rows))[0]
        # DᵀQ = ZC with a small C: the SVD of Cᵀ is that of QᵀD, turned by Z
        rows, small = _qr(delta.transposed_times(columns))
        with one_core():
            u, s, v = torch.linalg.svd(small.double().t())
        return Truncated(
            columns @ u[:, :rank].float(),
            s[:rank].float(),
            (rows @ v[:rank].t().float()).t().contiguous(),
            energy,
        )


def rank_for_energy(truncated: Truncated, share: float) -> int | None:
    """The smallest rank that captures this share of ‖I − B‖_F²; None where all R together do
    not."""
    kept = truncated.s.double().square().cumsum(0).tolist()
    return next(
        (k for k, captured in enumerate([0.0, *kept]) if captured >= share * truncated.energy), None
    )


def factors(truncated: Truncated, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U [M, R] and V [R, N] of the leading `rank` triplets for `LowRank`: each takes √s, so that
    neither leaves a 16-bit range.
    """
    root = truncated.s[:rank].sqrt()
    return (truncated.u[:, :rank] * root).to(dtype), (truncated.v[:rank] * root[:, None]).to(dtype)


def _qr(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Small beside the products, and made of many short steps at each of which torch's threads
    would wait for each other."""
    with one_core():
        q, r = torch.linalg.qr(tall)
    return q, r


class _Delta:
    """I − B in fp32, never whole: each use makes it anew, piece by piece."""

    def __init__(self, base: Tensor, inst: Tensor):
        self.base, self.inst = base.detach(), inst.detach()
        self.shape = (base.shape[0], base.shape[1])
        self.on_cpu = base.device.type == "cpu"

    def part(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        return self.inst[rows, columns].float() - self.base[rows, columns].float()

    def pieces(self, axis: int) -> list[slice]:
        """Ranges of rows (axis 0) or columns (1)."""
        step = max(1, (CPU_PIECE if self.on_cpu else GPU_PIECE) // max(self.shape[1 - axis], 1))
        return [
            slice(start, min(start + step, self.shape[axis]))
            for start in range(0, self.shape[axis], step)
        ]

    def over_pieces(self, work: Callable[[slice], T], axis: int) -> list[T]:
        if not self.on_cpu:
            return [work(piece) for piece in self.pieces(axis)]

        def on_one_core(piece: slice) -> T:
            with torch.no_grad(), one_core():
                return work(piece)

        return over_cores(on_one_core, self.pieces(axis))

    def energy(self) -> float:
        norms = self.over_pieces(
            lambda rows: float(torch.linalg.vector_norm(self.part(rows), dtype=torch.float64)), 0
        )
        return math.fsum(norm**2 for norm in norms)

    def times(self, matrix: Tensor) -> Tensor:
        return torch.cat(self.over_pieces(lambda rows: self.part(rows) @ matrix, 0))

    def transposed_times(self, matrix: Tensor) -> Tensor:
        return torch.cat(
            self.over_pieces(lambda columns: self.part(columns=columns).t() @ matrix, 1)
        )


def _check(base: Tensor, inst: Tensor, rank: int, power: int, oversample: int) -> None:
    for side, tensor in (("base", base), ("instruct", inst)):
        if tensor.dtype not in LIVE_DTYPES:
            raise TypeError(f"{side} is {tensor.dtype}, expected bfloat16, float16 or float32")
        if tensor.dim() != 2 or tensor.shape != base.shape or tensor.device != base.device:
            raise ValueError(
                f"{side} has shape {tuple(tensor.shape)} on {tensor.device}, expected one shape [M,"
                " N] and one device for both"
            )
    if not 0 <= rank <= min(base.shape):
        raise ValueError(
            f"rank {rank}, expected 0 to {min(base.shape)} for shape {tuple(base.shape)}"
        )
    if power < 0 or oversample < 0:
        raise ValueError(
            f"power {power} and oversample {oversample}, expected neither to be negative"
        )

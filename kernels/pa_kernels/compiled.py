"""Loops of the CPU paths that are one pass over memory, where torch takes one for each operation:
compiled by numba, if it is installed (`pip install pa_fast[cpu]`).

Everything here has another way in torch, with the same bits; `loops` gives these only after they
have agreed with the reference on this machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pa_kernels import reference
from pa_kernels.reference import CHUNK_WORDS, FOLD


@dataclass(frozen=True)
class Loops:
    """Functions of contiguous numpy arrays that hold the bits of bf16 in int16. They run without
    Python's lock, and use one core.

    Attributes:
        checksum: (words int64 [chunks · CHUNK_WORDS], low [CHUNK_WORDS], high [chunks], fold) →
            Σ (word + fold · (word >> 32)) · low · high mod 2⁶⁴.
        lerp_: (w, b, i, weight, base_near, low, high) → that sum of what was written, zero-padded,
            and Σ (w − b)(i − b): w = the contract of `reference.lerp`, for λ other than 0 and 1.
            `weight` is λ, or λ − 1 where base is not near.
        products: (w, b, i, before) → before + Σ (w − b)(i − b), of what is in w.

    Sums of products are those of `projection`: in an order that is the same on every machine.
    """

    checksum: Callable[..., int]
    lerp_: Callable[..., tuple[int, float]]
    products: Callable[..., float]


WORTH_BYTES = 1 << 26
"""Bytes of live tensors from which on a sweep gains more than it takes to load numba."""

_ready: list[Loops] = []


def ready() -> Loops | None:
    """Return the compiled loops if this process has them already; see `loops`."""
    return _ready[0] if _ready else None


def prepare(nbytes: int) -> None:
    """Make `ready` return the loops, if they can be had and work on `nbytes` bytes is worth it."""
    if nbytes >= WORTH_BYTES and not _ready and (built := loops()) is not None:
        _ready.append(built)


@functools.cache
def loops() -> Loops | None:
    """Return the compiled loops; None where numba is missing or cannot compile them here, or where
    they do not give the reference's bits.

    Cost: 5 s once for each user and version, to compile; then 0.6 s for each process.
    """
    try:
        from pa_kernels import compiled_loops

        built = Loops(compiled_loops.checksum, compiled_loops.lerp_, compiled_loops.products)
        return built if _is_exact(built) else None
    except Exception:  # of a numba that is not made for this Python, numpy or processor
        return None


def _is_exact(built: Loops) -> bool:
    """Return whether the loops give the reference's bits, by chosen values, and sums as well."""
    low = reference.odd_low(torch.arange(CHUNK_WORDS, device="cpu")).numpy()
    high = reference.odd_high(torch.arange(1, device="cpu")).numpy()
    for b, i, lam in reference.probe(torch.bfloat16):
        expected = reference.lerp(b, i, lam)
        out = torch.empty_like(b)
        sides = [side.contiguous().view(torch.int16).numpy() for side in (out, b, i)]
        base_near = abs(reference.fp32(lam)) < 0.5
        weight = np.float32(lam) - np.float32(0 if base_near else 1)
        total, moved = built.lerp_(*sides, weight, base_near, low, high)
        finite = b.isfinite() & i.isfinite() & expected.isfinite()
        if not bool((reference.same_bits(out, expected) | ~finite).all()):
            return False
        if total % 2**64 != reference.checksum(out):
            return False
        if not np.array_equal(moved, built.products(*sides, 0.0), equal_nan=True):
            return False
        deltas = (out.double() - b.double()) * (i.double() - b.double())
        if bool(finite.all()) and abs(moved - float(deltas.sum())) > 1e-5 * float(
            deltas.abs().sum()
        ):
            return False
    words = torch.arange(2 * CHUNK_WORDS, device="cpu") * 0x9E3779B97F4A7C1
    high = reference.odd_high(torch.arange(2, device="cpu")).numpy()
    return all(
        built.checksum(words.numpy(), low, high, fold) % 2**64 == reference.checksum(words, version)
        for version, fold in FOLD.items()
    )

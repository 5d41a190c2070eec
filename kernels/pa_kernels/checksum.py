"""Word sums of tensors: the proof that live weights are what they were, at the price of one read pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.cores import over_cores
from pa_kernels.reference import CHUNK_WORDS
from pa_kernels.tiles import INTERPRETED

PIECE_CHUNKS = 512
"""Chunks per unit of work on the CPU (32 MiB): pieces are summed side by side, one thread each."""


def checksum(tensors: Sequence[Tensor]) -> list[int]:
    """`reference.checksum` of each of T tensors: Σ_j word_j · odd(j) mod 2⁶⁴.

    Args:
        tensors: contiguous, any dtype, any alignment, on the CPU or a GPU; 0 elements give 0.

    Numerics:
        Exact; equal on every device.

    Cost:
        One read of every byte. On a GPU one launch per device, one atomic add per tile and one wait for the result.

    Raises:
        ValueError: a tensor is not contiguous, or is on another kind of device.
    """
    flat = [_bytes(t, tensor) for t, tensor in enumerate(tensors)]
    sums = [0] * len(flat)
    on_cpu = [t for t, data in enumerate(flat) if data.device.type == "cpu" and not INTERPRETED]
    for t, total in zip(on_cpu, _cpu_sums([flat[t] for t in on_cpu])):
        sums[t] = total
    for device in {flat[t].device for t in set(range(len(flat))) - set(on_cpu)}:
        from pa_kernels import checksum_triton

        here = [t for t, data in enumerate(flat) if data.device == device]
        for t, total in zip(here, checksum_triton.sums([flat[t] for t in here])):
            sums[t] = total
    return [total % 2**64 for total in sums]


def _bytes(t: int, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"entry {t}: strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected contiguous")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"entry {t}: on {tensor.device}, expected cpu or cuda")
    return tensor.detach().view(-1).view(torch.uint8)


def _cpu_sums(flat: Sequence[Tensor]) -> list[int]:
    """Sums of byte tensors; int64 arithmetic wraps, which is the modulus."""
    step = PIECE_CHUNKS * CHUNK_WORDS * 8
    pieces = [(t, start) for t, data in enumerate(flat) for start in range(0, data.numel(), step)]
    sums = [0] * len(flat)

    def piece_sum(piece: tuple[int, int]) -> int:
        t, start = piece
        with torch.inference_mode():
            return _piece_sum(flat[t][start : start + step], start // (CHUNK_WORDS * 8))

    totals = over_cores(piece_sum, pieces)
    for (t, _), total in zip(pieces, totals):
        sums[t] += total
    return sums


def _piece_sum(data: Tensor, first_chunk: int) -> int:
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8
    words = data[: whole * 8].view(torch.int64)
    rows = whole // CHUNK_WORDS
    low = _low_factors()
    total = 0
    if rows:
        # Σ_r high_r · word_rc first: one integer matrix-vector product streams the words past an accumulator in L2
        columns = torch.mv(
            words[: rows * CHUNK_WORDS].view(rows, CHUNK_WORDS).t(), _high_factors(first_chunk // PIECE_CHUNKS)[:rows]
        )
        total = int((columns * low).sum())
    rest = words[rows * CHUNK_WORDS :]
    tail = int((rest * low[: rest.numel()]).sum())
    left = bytes(data[whole * 8 :].tolist())
    tail += int.from_bytes(left, "little") * int(low[rest.numel()]) if left else 0
    return total + tail * int(_high_factors(first_chunk // PIECE_CHUNKS)[rows]) if tail else total


@functools.cache
def _low_factors() -> Tensor:
    return reference.odd_low(torch.arange(CHUNK_WORDS, device="cpu"))


@functools.lru_cache(maxsize=4096)
def _high_factors(piece: int) -> Tensor:
    """The high factors of a piece's chunks, and of one more for a tensor that ends with it."""
    first = piece * PIECE_CHUNKS
    return reference.odd_high(torch.arange(first, first + PIECE_CHUNKS + 1, device="cpu"))

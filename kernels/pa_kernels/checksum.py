"""Word sums of tensors: the proof that live weights are what they were, at the price of one read
pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.cores import inference, over_cores, pieces
from pa_kernels.reference import CHUNK_WORDS
from pa_kernels.tiles import is_on_cpu

CHUNK_BYTES = 8 * CHUNK_WORDS

PIECE_CHUNKS = 512
"""Chunks per unit of work on the CPU (32 MiB): pieces are summed side by side, one thread each."""


def checksum(tensors: Sequence[Tensor]) -> list[int]:
    """`reference.checksum` of each of T tensors: Σ_j word_j · odd(j) mod 2⁶⁴.

    Args:
        tensors: contiguous, any dtype, any alignment, on the CPU or a GPU; 0 elements give 0.

    Numerics:
        Exact; equal on every device.

    Cost:
        One read of every byte. On a GPU one launch per device, one atomic add per tile and one wait
        for the result.

    Raises:
        ValueError: a tensor is not contiguous, or is on another kind of device.
    """
    flat = [_bytes(t, tensor) for t, tensor in enumerate(tensors)]
    members: dict[torch.device | None, list[int]] = {}
    for t, data in enumerate(flat):
        members.setdefault(None if is_on_cpu(data) else data.device, []).append(t)
    sums = [0] * len(flat)
    for device, entries in members.items():
        totals = _sums([flat[t] for t in entries], device)
        for t, total in zip(entries, totals):
            sums[t] = total % 2**64
    return sums


def _sums(flat: Sequence[Tensor], device: torch.device | None) -> list[int]:
    """Sums, mod 2⁶⁴, of byte tensors that are all on one GPU, or else on the CPU."""
    if device is None:
        return _cpu_sums(flat)
    from pa_kernels import checksum_triton

    return checksum_triton.sums(flat)


def _bytes(t: int, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(
            f"entry {t}: strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected"
            " contiguous"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"entry {t}: on {tensor.device}, expected cpu or cuda")
    return tensor.detach().view(-1).view(torch.uint8)


def _cpu_sums(flat: Sequence[Tensor]) -> list[int]:
    """Sums of byte tensors; int64 arithmetic wraps, which is the modulus."""
    step = PIECE_CHUNKS * CHUNK_BYTES
    work = [(t, piece) for t, data in enumerate(flat) for piece in pieces(data.numel(), step)]

    def piece_sum(one: tuple[int, slice]) -> int:
        t, piece = one
        with inference():
            return piece_checksum(flat[t][piece], piece.start // CHUNK_BYTES)

    sums = [0] * len(flat)
    for (t, _), total in zip(work, over_cores(piece_sum, work)):
        sums[t] += total
    return sums


def piece_checksum(piece: Tensor, first_chunk: int) -> int:
    """Return what a piece of a CPU tensor adds to the tensor's checksum: the sum of these over all
    pieces is it, mod 2⁶⁴.

    The hash of a word factorises by chunks: odd(j) = high(chunk of j) · low(place in the chunk).

    Args:
        piece: contiguous elements, any dtype; a whole number of chunks (`CHUNK_BYTES`) unless it
            ends its tensor.
        first_chunk: chunks before it in its tensor.
    """
    data = piece.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // CHUNK_BYTES
    words = data[: whole * CHUNK_BYTES].view(torch.int64).view(whole, CHUNK_WORDS)
    total = 0
    if whole:
        # int64 products wrap, which is the modulus; einsum is vectorised for them where torch.mv is
        # not
        rows = np.einsum("ij,j->i", words.numpy(), _low_factors().numpy())
        total = int(np.dot(rows, _high_factors(first_chunk, whole).numpy()))
    rest = data[whole * CHUNK_BYTES :]
    if rest.numel():
        padded = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device="cpu")
        padded[: rest.numel()] = rest
        total += int(torch.dot(padded.view(torch.int64), _low_factors())) * int(
            _high_factors(first_chunk + whole, 1)
        )
    return total % 2**64


@functools.cache
def _low_factors() -> Tensor:
    return reference.odd_low(torch.arange(CHUNK_WORDS, device="cpu"))


@functools.lru_cache(maxsize=4096)
def _high_factors(first_chunk: int, count: int) -> Tensor:
    return reference.odd_high(torch.arange(first_chunk, first_chunk + count, device="cpu"))

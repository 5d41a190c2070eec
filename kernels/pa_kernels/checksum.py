"""Word sums of tensors: the proof that live weights are what they were, at the price of one read
pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pa_kernels import compiled, reference
from pa_kernels.cores import Scratch, inference, over_cores, pieces
from pa_kernels.reference import CHECKSUM_VERSION, CHUNK_WORDS, FOLD
from pa_kernels.tiles import is_on_cpu

CHUNK_BYTES = 8 * CHUNK_WORDS

PIECE_CHUNKS = 512
"""Chunks per unit of work on the CPU (32 MiB): pieces are summed side by side, one thread each."""

FOLDED_CHUNKS = 8
"""Chunks that are folded at a time: they and their copy stay in a core's L2."""

_scratch = Scratch()


class Checksum:
    """T tensors whose checksums are taken again and again: tables are made once.

    Args:
        tensors: contiguous, any dtype, any alignment, on the CPU or a GPU; 0 elements give 0. They
            must stay where they are.
        version: of the checksum, see `reference.checksum`.

    Numerics:
        Exact; equal on every device.

    Cost:
        A sum is one read of every byte. On a GPU one launch per device, one atomic add per tile of
        32 KiB; tables of 8 bytes per tile and 24 per tensor.

    Raises:
        ValueError: a tensor is not contiguous, or is on another kind of device.
    """

    def __init__(self, tensors: Sequence[Tensor], version: int = CHECKSUM_VERSION):
        self._version = version
        self._flat = [_bytes(t, tensor) for t, tensor in enumerate(tensors)]
        self._cpu = [t for t, data in enumerate(self._flat) if is_on_cpu(data)]
        compiled.prepare(sum(self._flat[t].numel() for t in self._cpu))
        members: dict[torch.device, list[int]] = {}
        for t in sorted(set(range(len(self._flat))) - set(self._cpu)):
            members.setdefault(self._flat[t].device, []).append(t)
        self._groups = [(entries, self._group(entries)) for entries in members.values()]

    def _group(self, entries: Sequence[int]) -> Any:
        from pa_kernels import checksum_triton

        return checksum_triton.ChecksumTritonGroup([self._flat[t] for t in entries], self._version)

    def sums(self) -> list[int]:
        """Return the checksum of each tensor as it is now. Waits for the devices, once each."""
        totals = dict(zip(self._cpu, _cpu_sums([self._flat[t] for t in self._cpu], self._version)))
        for _, group in self._groups:  # all of them first, then the first wait
            group.launch_()
        for entries, group in self._groups:
            totals.update(zip(entries, group.totals.tolist()))
        return [totals[t] % 2**64 for t in range(len(self._flat))]


def checksum(tensors: Sequence[Tensor], version: int = CHECKSUM_VERSION) -> list[int]:
    """Return `reference.checksum` of each of T tensors, once: Σ_j folded(word_j) · odd(j) mod 2⁶⁴;
    see `Checksum` for the arguments, and for many times."""
    return Checksum(tensors, version).sums()


def _bytes(t: int, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(
            f"entry {t}: strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected"
            " contiguous"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"entry {t}: on {tensor.device}, expected cpu or cuda")
    return tensor.detach().view(-1).view(torch.uint8)


def _cpu_sums(flat: Sequence[Tensor], version: int) -> list[int]:
    """Sums of byte tensors; int64 arithmetic wraps, which is the modulus."""
    step = PIECE_CHUNKS * CHUNK_BYTES
    work = [(t, piece) for t, data in enumerate(flat) for piece in pieces(data.numel(), step)]

    def piece_sum(one: tuple[int, slice]) -> int:
        t, piece = one
        with inference():
            return piece_checksum(flat[t][piece], piece.start // CHUNK_BYTES, version)

    sums = [0] * len(flat)
    for (t, _), total in zip(work, over_cores(piece_sum, work)):
        sums[t] += total
    return sums


def piece_checksum(piece: Tensor, first_chunk: int, version: int = CHECKSUM_VERSION) -> int:
    """Return what a piece of a CPU tensor adds to the tensor's checksum: the sum of these over all
    pieces is it, mod 2⁶⁴.

    The hash of a word factorises by chunks: odd(j) = high(chunk of j) · low(place in the chunk).

    Args:
        piece: contiguous elements, any dtype; a whole number of chunks (`CHUNK_BYTES`) unless it
            ends its tensor.
        first_chunk: chunks before it in its tensor.
        version: of the checksum.
    """
    data = piece.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // CHUNK_BYTES
    words = data[: whole * CHUNK_BYTES].view(torch.int64).view(whole, CHUNK_WORDS)
    loops = compiled.ready()
    if loops is not None and whole:
        high = high_factors(first_chunk, whole).numpy()
        flat, fold = words.view(-1).numpy(), FOLD[version]
        total = loops.checksum(flat, low_factors().numpy(), high, fold)
        rest = data[whole * CHUNK_BYTES :]
        return (total + (piece_checksum(rest, first_chunk + whole, version))) % 2**64
    rows = [_row_sums(words[part], version) for part in pieces(whole, FOLDED_CHUNKS)]
    rest = data[whole * CHUNK_BYTES :]
    if rest.numel():
        padded = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device="cpu")
        padded[: rest.numel()] = rest
        rows.append(_row_sums(padded.view(torch.int64).view(1, CHUNK_WORDS), version))
    if not rows:
        return 0
    sums = np.concatenate(rows)
    return int(np.dot(sums, high_factors(first_chunk, len(sums)).numpy())) % 2**64


def _row_sums(words: Tensor, version: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return Σ folded(word) · low(place) of each chunk of `words` [chunks, CHUNK_WORDS], mod
    2⁶⁴."""
    if FOLD[version]:
        folds = _scratch.take("folds", words.numel(), torch.int64).view(words.shape)
        torch.bitwise_right_shift(words, 32, out=folds)
        words = torch.add(words, folds, alpha=FOLD[version], out=folds)
    # int64 products wrap, which is the modulus; einsum is vectorised for them where torch.mv is not
    return np.einsum("ij,j->i", words.numpy(), low_factors().numpy())


@functools.cache
def low_factors() -> Tensor:
    """Return `reference.odd_low` of all places in a chunk, int64 [CHUNK_WORDS]."""
    return reference.odd_low(torch.arange(CHUNK_WORDS, device="cpu"))


@functools.lru_cache(maxsize=4096)
def high_factors(first_chunk: int, count: int) -> Tensor:
    """Return `reference.odd_high` of these chunks, int64 [count]."""
    return reference.odd_high(torch.arange(first_chunk, first_chunk + count, device="cpu"))

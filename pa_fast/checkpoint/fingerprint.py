"""The content fingerprint of a checkpoint: one number that every weight enters, however the files are cut.

    F = Σ_t odd(name_t) · S_t mod 2^64,   S_t = `pa_kernels.checksum` of tensor t

Live weights sum the same way, so the two are comparable where layouts agree.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 65536  # 8 · `pa_kernels.reference.CHUNK_WORDS`: a constant of the format


def name_hash(name: str) -> int:
    """odd(name): an odd 64-bit number from blake2b of the UTF-8 name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def combine(sums: Mapping[str, int]) -> int:
    """Σ odd(name) · S mod 2^64 over checksums by tensor name."""
    return sum(name_hash(name) * value for name, value in sums.items()) % 2**64


def as_hex(value: int) -> str:
    """A 64-bit number as 16 hex digits, its form in every file."""
    return f"{value:016x}"


def piece_checksum(piece: torch.Tensor, first_chunk: int) -> int:
    """What a piece of a tensor adds to the tensor's checksum: the sum of these over all pieces is S_t mod 2^64.

    The hash of a word factorises by 64 KiB chunks: odd(j) = high(chunk of j) · low(place in the chunk).

    Args:
        piece: contiguous elements, any dtype; a whole number of chunks unless it ends its tensor.
        first_chunk: chunks before it in its tensor.
    """
    import torch
    from pa_kernels.reference import CHUNK_WORDS

    data = piece.reshape(-1).view(torch.uint8)
    whole = data.numel() // CHUNK_BYTES
    words = data[: whole * CHUNK_BYTES].view(torch.int64).view(whole, CHUNK_WORDS)
    # int64 mv wraps mod 2^64, and streams at 14 GB/s on one core where multiply-then-sum does 10
    total = int(torch.dot(torch.mv(words, _low()), _high(first_chunk, whole))) if whole else 0
    rest = data[whole * CHUNK_BYTES :]
    if rest.numel():
        padded = torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
        padded[: rest.numel()] = rest
        total += int(torch.dot(padded.view(torch.int64), _low())) * int(_high(first_chunk + whole, 1))
    return total % 2**64


@functools.cache
def _low() -> torch.Tensor:
    """low(place) for every place in a chunk: 64 KiB."""
    import torch
    from pa_kernels.reference import CHUNK_WORDS, odd_low

    return odd_low(torch.arange(CHUNK_WORDS, device="cpu"))


@functools.lru_cache(maxsize=4096)
def _high(first_chunk: int, count: int) -> torch.Tensor:
    """high(chunk) for `count` chunks."""
    import torch
    from pa_kernels.reference import odd_high

    return odd_high(torch.arange(first_chunk, first_chunk + count, device="cpu"))

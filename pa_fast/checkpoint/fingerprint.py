"""The content fingerprint of a checkpoint: one number that every weight enters, however the files
are cut.

    F = Σ_t odd(name_t) · S_t mod 2^64,   S_t = `pa_kernels.checksum` of tensor t

Live weights sum the same way, so the two are comparable where layouts agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def name_hash(name: str) -> int:
    """odd(name): an odd 64-bit number from blake2b of the UTF-8 name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def combine(sums: Mapping[str, int]) -> int:
    """Σ odd(name) · S mod 2^64 over checksums by tensor name."""
    return sum(name_hash(name) * value for name, value in sums.items()) % 2**64


def as_hex(value: int) -> str:
    """A 64-bit number as 16 hex digits, its form in every file."""
    return f"{value:016x}"

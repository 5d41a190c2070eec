"""Bytes, seconds and rates, parsed and printed."""

from __future__ import annotations

import re

from pa_fast.errors import UsageError

_STEPS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """Return the bytes in `text`: `5GB` is 5·10⁹, `5GiB` is 5·2³⁰, a bare number is bytes.

    Raises:
        UsageError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    step = _STEPS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * step) if match and step else 0
    if size <= 0:
        raise UsageError(f"`{text}` is not a size", "write for example 5GB, 500MB or 2GiB")
    return size


def format_bytes(count: float) -> str:
    """Return `count` bytes in decimal units with three digits: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Return `seconds` as a person says them: 3.2 ms, 4.1 s, 5 min 03 s, 2 h 10 min."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(count: float, seconds: float) -> str:
    """Return `count` bytes in `seconds`, per second."""
    return f"{format_bytes(count / max(seconds, 1e-9))}/s"


def format_count(count: int, noun: str) -> str:
    """Return `count` of `noun`: 1 file, 2 files."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")

"""Sizes, times and rates as people write and read them; λ as files spell it."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.units import format_bytes, format_count, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("17", 17)],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "nan", "1e9"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


def test_bytes_and_seconds_are_printed() -> None:
    assert [format_bytes(n) for n in (0, 999, 1234, 999_600, 5e9, 7e12)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "1 MB",
        "5 GB",
        "7 TB",
    ]
    assert [format_seconds(s) for s in (0.0032, 4.12, 59.96, 303, 7800)] == [
        "3.2 ms",
        "4.1 s",
        "1 min 00 s",
        "5 min 03 s",
        "2 h 10 min",
    ]


def test_rates_and_counts_are_printed() -> None:
    assert format_rate(3e9, 2) == "1.5 GB/s"
    assert [format_count(n, "file") for n in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("0.30", "0.3"),
        (0.3, "0.3"),
        ("1/3", "1/3"),
        ("3/10", "0.3"),
        ("-0.2", "-0.2"),
        (-0.0, "0"),
        (1, "1"),
        ("1e-3", "0.001"),
        (Fraction(25), "25"),
        ("0.05", "0.05"),
    ],
)
def test_a_lambda_has_one_spelling(value: str | float | Fraction, key: str) -> None:
    assert Lambda(value).key == key
    assert Lambda(key) == Lambda(value)


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=10**6))
def test_every_spelling_reads_back_exactly(value: Fraction) -> None:
    lam = Lambda(value)
    assert Lambda(lam.key).exact == value
    assert float(lam) == float(value)
    assert pickle.loads(pickle.dumps(lam)).exact == value


@given(st.floats(min_value=-1e30, max_value=1e30))
def test_a_float_is_its_shortest_decimal(value: float) -> None:
    assert float(Lambda(value)) == value
    assert float(Lambda(Lambda(value).key)) == value


def test_numbers_of_other_libraries_are_taken() -> None:
    assert Lambda(np.float64(0.3)).key == "0.3"
    assert Lambda(np.int64(2)).key == "2"
    assert Lambda(Lambda("1/3")).key == "1/3"


@pytest.mark.parametrize(
    "value",
    [
        "nan",
        "inf",
        "",
        "a",
        "1/0",
        float("nan"),
        1e39,
        "-1e400",
        "1e999999999",
        "1e-450",
        "1_0",
        "٣",
        None,
        [1],
    ],
)
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="λ"):
        Lambda(value)

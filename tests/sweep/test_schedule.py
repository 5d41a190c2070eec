"""Schedules: exact arithmetic, both ends, and refusals that say what to write instead."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.sweep.entry import JournalEntry, parse
from pa_fast.sweep.schedule import MAX_POINTS, lambdas


def keys(text: object) -> list[str]:
    return [lam.key for lam in lambdas(text)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1:0.25", ["0", "0.25", "0.5", "0.75", "1"]),
        ("0:1:1/3", ["0", "1/3", "2/3", "1"]),
        ("1:0:-0.5", ["1", "0.5", "0"]),
        ("-0.2:0.2:0.1", ["-0.2", "-0.1", "0", "0.1", "0.2"]),
        ("0,0.25,1/3", ["0", "0.25", "1/3"]),
        (" 0 : 1 : 0.5 , 1.5 ", ["0", "0.5", "1", "1.5"]),
        ("0.5,0:1:0.5,0.50,1/2", ["0.5", "0", "1"]),
        ("0.3:0.3:0.1", ["0.3"]),
        (
            ["0:1:0.5", 0.25, Lambda("1/3"), 2, Fraction(1, 3)],
            ["0", "0.5", "1", "0.25", "1/3", "2"],
        ),
        (np.array([0.0, 0.3]), ["0", "0.3"]),
        ((lam for lam in (0.1, 0.1)), ["0.1"]),
        ("1e-2", ["0.01"]),
    ],
)
def test_parsed(text: object, expected: list[str]) -> None:
    assert keys(text) == expected


TENTHS = [lam.key for lam in lambdas("0:1:0.1")]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (np.linspace(0, 1, 11), TENTHS),
        (np.linspace(0, 1, 11, dtype=np.float32), TENTHS),
        (torch.linspace(0, 1, 11), TENTHS),
        (torch.linspace(0, 1, 11, dtype=torch.float64), TENTHS),
        (np.arange(11) * 0.1, TENTHS),
        (list(itertools.accumulate([0.0] + [0.1] * 10)), TENTHS),
        (np.arange(-1, 1.05, 0.1), [lam.key for lam in lambdas("-1:1:0.1")]),
        (np.linspace(0, 1, 1001), [lam.key for lam in lambdas("0:1:0.001")]),
        (0.1 + 0.2, ["0.3"]),
        ([0.3, 0.1 + 0.2], ["0.3"]),  # the same weights: both are one fp32
        (np.geomspace(1e-17, 1, 18), [Lambda(f"1e-{n}").key for n in range(17, -1, -1)]),
        ([np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))], ["0.3", "0.30000004"]),
        ([0.123456789012345, 0.3333333333333333], ["0.123456789012345", "0.3333333333333333"]),
        (["0.30000000000000004", Lambda(0.1 + 0.2), "0.3"], ["0.30000000000000004", "0.3"]),
    ],
)
def test_a_float_is_the_decimal_that_it_misses_by_rounding(
    grid: object, expected: list[str]
) -> None:
    assert keys(grid) == expected


def test_decimal_steps_do_not_accumulate() -> None:
    assert keys("0:1:0.1") == ["0", *(f"0.{n}" for n in range(1, 10)), "1"]
    assert float(lambdas("0:1:0.1")[3]) == 0.3


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("auto", "the schedule `auto` stands alone", "0:1:0.1"),
        ("", "the schedule names no λ", "0:1:0.1"),
        ("0,,1", "a λ is missing", "0:1:0.1"),
        ([], "names no λ", "0:1:0.1"),
        ("0:1:0", "step of `0:1:0` is zero", "0:1:0.1"),
        ("0:1:-0.1", "leads away", "0:1:0.1"),
        ("1:0:0.1", "leads away", "1:0:-0.1"),
        (
            "0:1:0.3",
            "does not divide",
            "nearest step that does is 1/3; with this step the range ends at 0.9",
        ),
        (
            "0:1:2",
            "does not divide",
            "nearest step that does is 1; with this step the range ends at 0",
        ),
        ("0:1", "not a range", "0:1:0.1"),
        ("0:1:0.1:2", "not a range", "0:1:0.1"),
        ("0:1:", "a λ is missing in `0:1:`", "0:1:0.1"),
        ("0:x:0.1", "λ `x` in `0:x:0.1` is not a number", "0:1:0.1"),
        ("nan", "not a number", "0:1:0.1"),
        ([float("nan")], "not a finite number", "0.6"),
        ([float("inf")], "not a finite number", "0.6"),
        ("1/0", "not a finite number", "0.6"),
        ("1e99", "does not fit in fp32", "smaller"),
        ("1e400", "does not fit in fp32", "smaller"),
        ([10**5000], "does not fit in fp32", "smaller"),
        ("1e-400", "does not fit in fp32", "use 0"),
        (f"1/{'3' * 200}{'7' * 200}", "does not fit in fp32", "use 0"),
        (f"{'3' * 400}/{'7' * 399}1", "more than 390 digits", "0.6"),
        ([True], "λ `True` is not a finite number", "0.6"),
        ([np.True_], "λ `True` is not a finite number", "0.6"),
        ([torch.tensor(True)], "is not a finite number", "0.6"),
        ("1e999999999", "not a number", "0:1:0.1"),
        ("0:1:1e-5", "more than 10,000", "larger step"),
        (None, "not a finite number", "0.6"),
        ([None], "not a finite number", "0.6"),
        (torch.zeros(2, 2), "not a finite number", "0:1:0.1"),
    ],
)
def test_refused(text: object, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        keys(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_an_endless_iterable_is_refused() -> None:
    with pytest.raises(UsageError, match="more than 10,000"):
        lambdas(n / 2**20 for n in itertools.count())
    assert len(lambdas(f"1:{MAX_POINTS}:1")) == MAX_POINTS
    with pytest.raises(UsageError, match="more than 10,000"):
        lambdas(f"0:{MAX_POINTS}:1")


exact = st.fractions(min_value=-3, max_value=3, max_denominator=60)


@given(start=exact, step=exact.filter(bool), count=st.integers(0, 50))
def test_a_range_holds_both_ends_and_equal_exact_steps(
    start: Fraction, step: Fraction, count: int
) -> None:
    text = ":".join(Lambda(part).key for part in (start, start + count * step, step))
    assert [lam.exact for lam in lambdas(text)] == [start + n * step for n in range(count + 1)]


@given(
    start=exact,
    span=exact.filter(bool),
    count=st.fractions(min_value=Fraction(1, 4), max_value=40, max_denominator=7),
)
def test_the_step_in_the_hint_divides(start: Fraction, span: Fraction, count: Fraction) -> None:
    ends, step = f"{Lambda(start).key}:{Lambda(start + span).key}", Lambda(span / count)
    try:
        assert len(lambdas(f"{ends}:{step.key}")) == count + 1
    except UsageError as error:
        assert count.denominator != 1
        nearest = (error.hint or "").split(" is ")[1].split(";")[0]
        assert lambdas(f"{ends}:{nearest}")[-1].exact == start + span


@given(st.lists(exact, min_size=1, max_size=30))
def test_keys_read_back_and_each_is_kept_once(parts: list[Fraction]) -> None:
    found = keys(",".join(Lambda(part).key for part in parts))
    assert found == list(dict.fromkeys(Lambda(part).key for part in parts))
    assert keys(",".join(found)) == found


@given(st.text(max_size=30))
def test_any_text_is_a_schedule_or_wrong_usage(text: str) -> None:
    try:
        assert lambdas(text)
    except UsageError as error:
        assert error.hint


@pytest.mark.parametrize(
    "value",
    [
        "1" * 4301,
        "0." + "3" * 4300,
        "1/" + "3" * 4300,
        "0:1:1/" + "3" * 4300,
        10**4300,
        Fraction(1, 3**9000),
        Fraction(10**4300 + 1, 10**4300),
    ],
    ids=range(7),
)
def test_a_λ_of_thousands_of_digits_is_one_short_message(value: Any) -> None:
    for make in (
        lambda: lambdas(value if isinstance(value, str) else [value]),
        lambda: Lambda(value),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert caught.value.hint and len(str(caught.value)) < 400


def test_every_λ_that_is_accepted_is_read_back_from_a_journal() -> None:
    for digits in (100, 190, 194, 195, 196, 200, 390, 399, 400):
        for value in (Fraction(1, 10**digits + 1) + 1, Fraction(10**digits + 1, 10**digits)):
            try:
                key = Lambda(value).key
            except UsageError:
                continue
            assert parse(JournalEntry(key, "icl", error="x").line()).lam == key

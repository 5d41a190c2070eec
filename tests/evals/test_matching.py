"""Exact match: what counts as the same answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.evals.rows import matches, normalised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "paris"),
        ("  New \t York\n", "new york"),
        ("It is 4.", "it is 4"),
        ("Yes!? ", "yes"),
        ("3.14", "3.14"),
        ("a. b.", "a. b"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_any_of_the_answers() -> None:
    assert matches(" four. ", ["4", "Four"])
    assert not matches("five", ["4", "four"])
    assert not matches("", ["?"]), "no answer is empty"


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing_and_empties_nothing(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert bool(once) == bool(text.strip())

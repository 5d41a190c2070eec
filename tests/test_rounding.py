"""`Rounding`: a value wherever its name is taken."""

from __future__ import annotations

import pathlib

import pytest

import pa_fast
from pa_fast import Rounding
from pa_fast.errors import UsageError
from tests.checkpoint.pairs import write_pair


def test_a_value_and_its_name_say_the_same() -> None:
    assert (
        Rounding.of("stochastic", 3)
        == Rounding.of(Rounding("stochastic", 3))
        == Rounding("stochastic", 3)
    )
    assert Rounding.of(Rounding("stochastic", 3), 3).seed == 3
    with pytest.raises(UsageError, match="seed 4 beside"):
        Rounding.of(Rounding("stochastic", 3), 4)


def test_merge_verify_and_inspect_take_a_rounding(tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path)
    pa_fast.merge(base, instruct, 0.3, tmp_path / "named", rounding="stochastic", seed=7)
    pa_fast.merge(base, instruct, 0.3, tmp_path / "value", rounding=Rounding("stochastic", 7))
    names = sorted(path.name for path in (tmp_path / "named").glob("*.safetensors"))
    for name in names:
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "value" / name).read_bytes()
    report = pa_fast.verify(tmp_path / "value", base, instruct, rounding=Rounding("stochastic", 7))
    assert (
        report.ok
        and not pa_fast.verify(
            tmp_path / "value", base, instruct, rounding=Rounding("stochastic", 8)
        ).ok
    )
    found = pa_fast.inspect(base, instruct, fidelity=[0.5], rounding=Rounding("stochastic", 1))
    assert found == pa_fast.inspect(base, instruct, fidelity=[0.5], rounding="stochastic", seed=1)


def test_a_rounding_is_read_from_its_own_text() -> None:
    for rounding in (Rounding(), Rounding("stochastic"), Rounding("stochastic", 7)):
        assert Rounding.parse(str(rounding)) == rounding
    for text in ("", "up?", "stochastic, seed x", "stochastic, seed -1", "nearest, seed 1"):
        with pytest.raises(UsageError):
            Rounding.parse(text)

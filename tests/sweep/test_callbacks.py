"""Callbacks of a sweep: what is called, when, and what an error in one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.sweep import journal
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.results import SweepResult
from tests.sweep.fakes import FakeEngine, Scorer


class Log:
    def __init__(self, out: Path):
        self.out = out
        self.calls: list[tuple[str, str]] = []

    def on_point(self, lam: Lambda, lm: FakeEngine) -> None:
        assert lm.weights.lam == float(lam) and lm.weights.verify()
        self.calls.append(("point", lam.key))

    def on_score(self, entry: JournalEntry) -> None:
        assert journal.read(self.out)[-1] == entry
        self.calls.append((entry.evaluator, entry.lam))

    def on_end(self, result: SweepResult) -> None:
        assert (self.out / "results.csv").read_bytes() == result.to_csv()
        self.calls.append(("end", str(len(result.rows))))


def test_each_is_called_in_order(tmp_path: Path) -> None:
    log, scorers = Log(tmp_path), [Scorer("a"), Scorer("b")]
    pa_fast.sweep(FakeEngine(), "0,1", scorers, tmp_path, figure=False, callbacks=[log])
    one = [("point", "0"), ("a", "0"), ("b", "0")]
    assert log.calls == [*one, *((name, "1") for name, _ in one), ("end", "4")]


def test_progress_and_callbacks_hear_the_same(tmp_path: Path) -> None:
    heard: list[str] = []

    class Heard:
        def recorded(self, entry: JournalEntry) -> None:
            heard.append(entry.lam)

        def on_score(self, entry: JournalEntry) -> None:
            heard.append(f"again {entry.lam}")

    one = Heard()
    pa_fast.sweep(
        FakeEngine(), "0,1", Scorer("a"), tmp_path, progress=one, figure=False, callbacks=[one]
    )
    assert heard == ["0", "again 0", "1", "again 1"]


def test_an_error_ends_the_sweep_and_loses_nothing(tmp_path: Path) -> None:
    class Stop:
        def on_score(self, entry: JournalEntry) -> None:
            if entry.lam == "0.5":
                raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        pa_fast.sweep(
            FakeEngine(), "0:1:0.5", Scorer("a"), tmp_path, figure=False, callbacks=[Stop()]
        )
    assert [row.lam.key for row in pa_fast.SweepResult.load(tmp_path).rows] == ["0", "0.5"]
    assert (tmp_path / "results.csv").exists()


@pytest.mark.parametrize(
    ("callbacks", "message"), [(list, "callbacks is a type"), ([list], "list is a class")]
)
def test_what_is_no_list_of_objects_is_refused(
    callbacks: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        pa_fast.sweep(
            FakeEngine(), "0", Scorer("a"), tmp_path / "o", figure=False, callbacks=callbacks
        )


def test_what_hears_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a object hears nothing"):
        pa_fast.sweep(
            FakeEngine(), "0", Scorer("a"), tmp_path / "o", figure=False, callbacks=[object()]
        )
    assert not (tmp_path / "o").exists()

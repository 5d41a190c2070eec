"""What a terminal and a log show of a sweep while it runs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from pa_fast.sweep import sweep
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.live_view import BLOCKS, PLAIN, Curves, JsonProgress, steps_for
from pa_fast.sweep.progress import TerminalProgress
from tests.sweep.fakes import FakeEngine, Scorer


def entry(lam: str, score: float | None, evaluator: str = "icl") -> JournalEntry:
    error = "no" if score is None else None
    return JournalEntry(lam, evaluator, score, "accuracy", 4, error=error)


def test_a_curve_goes_from_the_lowest_score_to_the_highest_in_the_order_of_λ() -> None:
    curves = Curves({"icl": True})
    for lam, score in (("1", 0.2), ("0", 0.1), ("0.5", 0.8), ("1/3", None), ("0.25", 0.5)):
        curves.add(entry(lam, score))
    [line] = curves.lines(80)
    assert line == "icl ▁▅█▂ best 0.8000 at λ = 0.5"


def test_a_cost_is_best_where_it_is_least_and_names_are_cut() -> None:
    curves, name = Curves({"n" * 60: False}, PLAIN), "n" * 60
    for k in range(200):
        curves.add(entry(f"{k}/200", float(k), name))
    [line] = curves.lines(80)
    assert len(line) <= 80 and "best 0.0000 at λ = 0" in line and "..." in line
    assert line.split()[1].startswith("_") and line.split()[1].endswith("@")


def test_nothing_is_shown_of_one_score_or_where_there_is_no_room() -> None:
    curves = Curves({"icl": True})
    curves.add(entry("0", 0.5))
    assert not list(curves.lines(80))
    curves.add(entry("1", 0.5))
    assert list(curves.lines(80)) == ["icl ▁▁ best 0.5000 at λ = 0"]
    assert not list(curves.lines(20))


def test_text_of_another_encoding_has_other_characters() -> None:
    assert steps_for("utf-8") == BLOCKS
    assert steps_for("ascii") == steps_for("no such thing") == steps_for(None) == PLAIN


def test_a_terminal_shows_the_curves_of_all_points(tmp_path: Path) -> None:
    sweep(FakeEngine(), "0,0.25", [Scorer("icl")], tmp_path, figure=False)
    shown = io.StringIO()
    console = Console(file=shown, width=90, force_terminal=True)
    scorer = Scorer("icl", act=lambda engine: time.sleep(0.15))
    sweep(
        FakeEngine(),
        "0:1:0.25",
        [scorer],
        tmp_path,
        progress=TerminalProgress(console),
        figure=False,
    )
    assert len(scorer.calls) == 3
    text = shown.getvalue()
    # five points in the end, the two of the first sweep among them
    assert any(len(part.split(" best")[0].strip()) == 4 for part in text.split("icl ")[1:])


def test_a_log_is_an_object_a_line(tmp_path: Path) -> None:
    log, engine = io.StringIO(), FakeEngine()
    engine.stale = {1.0}
    sweep(engine, "0,1", [Scorer("icl")], tmp_path, progress=JsonProgress(log), figure=False)
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [e["event"] for e in events] == [
        *("begin", "switched", "evaluating", "recorded", "recorded", "end"),
    ]
    first, failed = (e for e in events if e["event"] == "recorded")
    assert (first["lambda"], first["done"], first["points"]) == ("0", 1, 2)
    assert isinstance(first["score"], float) and failed["error"] and "traceback" not in failed
    assert all(abs(e["time"] - time.time()) < 60 for e in events)


@pytest.mark.parametrize("log_format", ["json", "yaml"])
def test_the_format_is_an_option(
    log_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pa_fast.cli.sweep_output import sweep_output
    from pa_fast.errors import UsageError

    if log_format == "yaml":
        with pytest.raises(UsageError, match="log format `yaml`"):
            sweep_output(log_format)
        return
    progress = sweep_output("json").progress
    sweep(FakeEngine(), "0", [Scorer("icl")], tmp_path, progress=progress, figure=False)
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["event"] == "end"

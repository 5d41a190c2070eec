"""The figure: the same bytes for the same results, whatever the user's settings, and no failure on
odd runs."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pa_fast.base import Engine, Lambda, Score
from pa_fast.sweep import figure, sweep
from pa_fast.sweep.report import report
from pa_fast.sweep.results import Failure, ResultRow, SweepResult
from pa_fast.sweep.schedule import lambdas
from tests.sweep.fakes import FakeEngine, Scorer
from tests.sweep.test_driver import Told

pytestmark = pytest.mark.draws

UNITS = {
    "icl": ("accuracy", True),
    "instructions": ("accuracy", True),
    "perplexity": ("nats", False),
    "$x_{": ("points", True),
}


def result(
    out: Path,
    points: str,
    names: tuple[str, ...],
    missing: tuple[str, ...] = (),
    failed: tuple[str, ...] = (),
) -> SweepResult:
    lams = tuple(sorted(lambdas(points), key=lambda lam: lam.exact))
    rows = [
        ResultRow(lam, name, math.sin(3 * float(lam) + n), UNITS[name][0], 50, float(lam))
        for lam in lams
        for n, name in enumerate(names)
        if lam.key not in missing + failed
    ]
    out.mkdir(exist_ok=True)
    failures = tuple(Failure(Lambda(key), names[0], "boom") for key in failed)
    return SweepResult(
        out, lams, names, tuple(UNITS[name][1] for name in names), tuple(rows), failures
    )


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    import matplotlib

    first = result(
        tmp_path / "a", "0:1:0.1", ("icl", "perplexity"), missing=("0.4",), failed=("0.6", "0.7")
    )
    figure.write(first)
    with matplotlib.rc_context(
        {"font.size": 30, "axes.labelpad": 30, "savefig.dpi": 30, "svg.hashsalt": None}
    ):
        figure.write(replace(first, out=result(tmp_path / "b", "0", ("icl",)).out))
    for name in ("trajectory.svg", "trajectory.png", "trajectory.pdf"):
        figure.check_output_path((tmp_path / "a" / name).with_suffix(""))
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    svg, png = (
        (tmp_path / "a" / "trajectory.svg").read_text(),
        (tmp_path / "a" / "trajectory.png").read_bytes(),
    )
    assert "dc:date" not in svg and "Matplotlib" not in svg
    assert png.startswith(b"\x89PNG") and b"tIME" not in png and b"Software" not in png
    assert int.from_bytes(png[16:20], "big") == 2000


@pytest.mark.parametrize(
    ("points", "names", "missing", "panels"),
    [
        ("0:1:0.25", ("icl",), (), 1),
        ("0.6", ("icl", "instructions"), (), 1),
        ("0:1:0.25", ("icl", "instructions"), (), 2),
        ("-0.5:1.5:0.25", ("icl", "instructions", "perplexity"), ("0", "1"), 2),
        ("0:1:0.01", ("$x_{", "perplexity"), (), 3),
        ("2:3:1/3", ("icl", "instructions", "perplexity", "$x_{"), (), 3),
    ],
)
def test_one_panel_per_unit_and_one_for_the_trade_off_of_two(
    tmp_path: Path, points: str, names: tuple[str, ...], missing: tuple[str, ...], panels: int
) -> None:
    drawn = figure.draw(result(tmp_path, points, names, missing))
    assert len(drawn.axes) == panels
    drawn.draw_without_rendering()


def test_missing_points_are_gaps_and_better_is_up_and_right(tmp_path: Path) -> None:
    drawn = figure.draw(result(tmp_path, "0:1:0.25", ("icl", "perplexity"), missing=("0.5",)))
    scores: Any = drawn.axes[0].lines[0].get_ydata()
    assert [math.isnan(score) for score in scores] == [False, False, True, False, False]
    trade_off = drawn.axes[-1]
    assert (
        trade_off.get_xlabel().startswith("icl")
        and not trade_off.xaxis_inverted()
        and trade_off.yaxis_inverted()
    )


def test_nothing_is_drawn_where_nothing_is_finished(tmp_path: Path) -> None:
    figure.write(result(tmp_path, "0,1", ("icl",), failed=("0", "1")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("icl",), ("icl", "perplexity")])
@pytest.mark.parametrize(
    "scores", [(1e308, -1e308, 0.0), (-1e308,) * 3, (1e308,) * 3, (0.0, 1.0, 1.7e308)]
)
def test_scores_that_no_axis_can_show_keep_their_table_and_are_told(
    tmp_path: Path,
    scores: tuple[float, ...],
    names: tuple[str, ...],
    recwarn: pytest.WarningsRecorder,
) -> None:
    told = Told()
    figure.write(result(tmp_path / "old", "0,1", names))

    class Scored(Scorer):
        def __call__(self, engine: Engine) -> Score:
            return Score(scores[round(2 * float(engine.weights.lam or 0))], UNITS[self.name][0], 1)

    evaluators = [Scored(name) for name in names]
    found = sweep(FakeEngine(), "0,0.5,1", evaluators, tmp_path / "run", progress=told)
    assert [row.score for row in found.rows] == [score for score in scores for _ in names]
    text = io.StringIO()
    Console(file=text, width=200).print(found.table())
    assert "e+308" in text.getvalue()
    assert any(
        "no figure was drawn" in str(note) and "e+308" in str(note)
        for kind, *note in told.told
        if kind == "noted"
    )
    assert (
        not list((tmp_path / "run").glob("trajectory.*"))
        and (tmp_path / "run" / "results.csv").exists()
    )
    for name in ("trajectory.svg", "trajectory.png", "trajectory.pdf"):
        (tmp_path / "old" / name).rename(tmp_path / "run" / name)
    notes: list[str] = []
    report([tmp_path / "run"], noted=notes.append)
    assert "no figure was drawn" in notes[0] and not list(
        (tmp_path / "run").glob("trajectory.*")
    ), "the old one is of other scores"
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_a_fault_in_the_figure_is_told_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(figure, "draw", broken)
    told = Told()
    assert len(sweep(FakeEngine(), "0,1", [Scorer("icl")], tmp_path, progress=told).rows) == 2
    assert ("noted", "no figure was drawn: ZeroDivisionError: float division by zero") in told.told


def test_λ_that_are_one_float_are_drawn(tmp_path: Path) -> None:
    figure.draw(
        result(tmp_path, "1,1.0000000000000000001", ("icl", "perplexity"))
    ).draw_without_rendering()


def scored(out: Path, higher: bool, *scores: float, name: str = "a", unit: str = "acc") -> Any:
    points = tuple(lambdas([n / 8 for n in range(len(scores))]))
    rows = tuple(
        ResultRow(lam, name, score, unit, 9, float(lam)) for lam, score in zip(points, scores)
    )
    return figure.draw(SweepResult(out, points, (name,), (higher,), rows, ()))


def test_a_share_is_drawn_from_0_to_1_or_its_axis_is_marked_as_cut(tmp_path: Path) -> None:
    def cut(drawn: Any) -> bool:
        return any(text.get_text() == "axis cut" for text in drawn.axes[0].texts)

    wide = scored(tmp_path, True, 0.2, 0.9)
    assert not cut(wide) and wide.axes[0].get_ylim()[0] <= 0 and wide.axes[0].get_ylim()[1] >= 1
    assert list(wide.axes[0].get_yticks()) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    for scores in ((0.6, 0.62), (0.6, 0.6), (7.0, 9.0), (-9.0, -8.0)):
        assert cut(scored(tmp_path, True, *scores)) and cut(scored(tmp_path, False, *scores))
    for scores in ((0.0, 0.1), (-1.0, 1.0), (0.01, 5.0)):
        assert not cut(scored(tmp_path, True, *scores))


def test_scores_that_span_decades_get_a_logarithmic_axis_with_plain_numbers(tmp_path: Path) -> None:
    drawn = scored(tmp_path, False, 3.0, 40.0, 3000.0, unit="perplexity")
    assert drawn.axes[0].get_yscale() == "log" and drawn.axes[0].get_ylim()[0] < 3
    drawn.draw_without_rendering()
    assert {"10", "100", "1000"} <= {label.get_text() for label in drawn.axes[0].get_yticklabels()}
    assert scored(tmp_path, False, 3.0, 40.0).axes[0].get_yscale() == "linear"
    assert scored(tmp_path, False, 0.0, 400.0).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_titles_fit_and_have_the_whole_name(count: int, tmp_path: Path) -> None:
    names = tuple(
        f"icl:a_long_file_of_tasks-{n},shots=5,mode=cloze,norm=none,average=micro"
        for n in range(count)
    )
    points = tuple(lambdas("0,0.5,1"))
    rows = tuple(
        ResultRow(lam, name, 0.5, f"unit {n} (per character), macro", 9, 1.0)
        for lam in points
        for n, name in enumerate(names)
    )
    drawn = figure.draw(SweepResult(tmp_path, points, names, (False,) * count, rows, ()))
    drawn.draw_without_rendering()
    right = drawn.bbox.x1
    for axes, name in zip(drawn.axes, names):
        title = next(t for t in (axes.title, axes._left_title, axes._right_title) if t.get_text())  # type: ignore[attr-defined]
        box, panel = title.get_window_extent(), axes.get_tightbbox()
        assert panel is not None and box.x1 <= right
        assert not any(
            box.overlaps(other.get_window_extent()) for other in drawn.axes if other is not axes
        )
        assert name in title.get_text().replace("\n", "")

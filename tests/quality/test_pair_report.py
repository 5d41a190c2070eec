"""A pair measured: the tables for people and the figure, by the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pa_fast import cli
from pa_fast.checkpoint.inspect import inspect
from pa_fast.errors import OutputError, UsageError
from pa_fast.quality import delta_map
from tests.checkpoint.test_measure import layered

pytestmark = pytest.mark.draws


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pa-fast", "inspect", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(side) for side in layered(tmp_path)]
    assert run(monkeypatch, *pair, "--full", "--fidelity", "0:1:0.5") == 0
    shown = capsys.readouterr().out
    for text in (
        "all 36,016 weights",
        "mlp.experts.*.w1",
        "self_attn.q_proj",
        "model.norm",
        "dense",
        "packed",
        "λ fidelity",
    ):
        assert text in shown, text
    assert "2–3" in shown.split() and "32768" not in shown


def test_the_fidelity_of_a_rule_stands_beside_what_the_rule_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(side) for side in layered(tmp_path)]
    asked = [*pair, "--full", "--fidelity", "0.5"]
    assert run(monkeypatch, *asked) == 0
    assert "intended λ" not in capsys.readouterr().out
    (tmp_path / "rule.yaml").write_text("- {match: '*', times: 1/4}\n")
    assert run(monkeypatch, *asked, "--rule", str(tmp_path / "rule.yaml")) == 0
    shown = capsys.readouterr().out
    assert "intended λ" in shown and " 0.125 " in shown
    assert run(monkeypatch, *asked, "--rule", str(tmp_path / "rule.yaml"), "--json") == 0
    (said,) = json.loads(capsys.readouterr().out)["measured"]["total"]["fidelity"]
    assert said["lam"] == "0.5" and said["intended_lambda"] == 0.125


def test_json_says_what_the_library_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct = layered(tmp_path)
    assert run(monkeypatch, str(base), str(instruct), "--fidelity", "0.05", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(inspect(base, instruct, fidelity=(0.05,)).to_json())


@pytest.mark.parametrize(("lambdas", "code"), [("0:1:0.3", 2), ("lots", 2)])
def test_a_wrong_grid_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lambdas: str, code: int
) -> None:
    assert run(monkeypatch, "nowhere", "nowhere", "--fidelity", lambdas) == code


def test_the_figure_is_drawn_and_equal_reports_draw_equal_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [str(side) for side in layered(tmp_path)]
    for name in ("one.png", "two"):
        assert run(monkeypatch, *pair, "--figure", str(tmp_path / name)) == 0
    for suffix in (".png", ".svg"):
        assert (tmp_path / "one").with_suffix(suffix).read_bytes() == (
            tmp_path / "two"
        ).with_suffix(suffix).read_bytes()
    drawn = (tmp_path / "one.svg").read_text()
    for text in ("self_attn.q_proj", "mlp.experts.*.w1", "layer", "white: no difference"):
        assert text in drawn, text


def test_a_figure_that_has_no_folder_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(side) for side in layered(tmp_path)]
    monkeypatch.setattr(
        "pa_fast.checkpoint.measure.measure", lambda *_, **__: pytest.fail("measured")
    )
    assert run(monkeypatch, *pair, "--figure", str(tmp_path / "none" / "map.png")) == 1
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'none'} is no folder, and the figure map belongs there" in shown
    assert "\n\nhint: make it" in shown and "points" not in shown and "Traceback" not in shown


def test_the_tables_are_there_where_the_figure_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(side) for side in layered(tmp_path)]
    (tmp_path / "taken.png").mkdir()
    assert run(monkeypatch, *pair, "--figure", str(tmp_path / "taken")) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "taken.png exists, and pa_fast did not draw it" in shown.err, (
        "known before anything is measured"
    )

    def full(path: Path, data: bytes, hint: str) -> None:
        raise OutputError(f"{path} cannot be written: No space left on device", hint)

    monkeypatch.setattr("pa_fast.files.write", full)
    assert run(monkeypatch, *pair, "--figure", str(tmp_path / "map")) == 1
    shown = capsys.readouterr()
    assert "self_attn.q_proj" in shown.out
    assert (
        "map.svg cannot be written" in shown.err
        and "draw it again" in shown.err
        and "points" not in shown.err
    )


def test_nothing_to_draw(tmp_path: Path) -> None:
    base, instruct = layered(tmp_path)
    for report in (inspect(base, instruct), inspect(base, base, full=True)):
        with pytest.raises(UsageError, match="nothing to draw"):
            delta_map.draw(report)


def test_the_map_has_a_row_for_each_module_and_a_column_for_each_layer(tmp_path: Path) -> None:
    figure = delta_map.draw(inspect(*layered(tmp_path, layers=14), full=True))
    inside, outside = figure.axes[:2]
    assert inside.images[0].get_array().shape == (2, 14) and outside.images[
        0
    ].get_array().shape == (1, 1)
    assert not inside.texts, "numbers only where there is room"
    row = inside.images[0].get_array()[1].tolist()
    assert row == sorted(row) and row[13] == pytest.approx(14 * row[0], rel=0.1), (
        "layer n has n + 1 times the delta of layer 0"
    )

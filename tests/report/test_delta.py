"""The size of a pair's delta in the report of its run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import pa_fast
from pa_fast import cli
from pa_fast.checkpoint.inspect import inspect
from pa_fast.errors import RunError, UsageError
from pa_fast.report import delta, write
from pa_fast.report.charts import delta_sizes
from pa_fast.sweep.results import SweepResult
from tests.report import runs
from tests.report.test_report import shown

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "pair"
PAIR = (DEMO / "base", DEMO / "instruct")


def zero(engine: object) -> float:
    return 0.0


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo pair."""
    out = tmp_path_factory.mktemp("delta") / "run"

    lm = pa_fast.load(*PAIR, endpoint_check=False)
    pa_fast.sweep(lm, "0,1", zero, out, figure=False)
    return out


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pa-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_inspect_keeps_it_and_the_page_shows_it(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(swept, tmp_path / "run")
    write([SweepResult.load(out)])
    assert "Size of the delta" not in shown((out / "report.html").read_text())
    assert command(monkeypatch, "inspect", *PAIR, "--run", out) == 0
    assert "how far apart: all 1,020,544 weights" in capsys.readouterr().out
    assert command(monkeypatch, "report", out) == 0
    page = (out / "report.html").read_text()
    assert "Size of the delta" in shown(page) and "model.embed_tokens" in shown(page)

    sizes, report = delta.load(out), inspect(*PAIR, full=True)
    assert sizes is not None and report.measured is not None
    norms = {part.name: part.relative_norm for part in report.measured.tensors}
    known = {(part.module, part.layer): part.norm for part in sizes.parts}
    assert known["self_attn.q_proj", 1] == norms["model.layers.1.self_attn.q_proj.weight"]
    assert known["model.norm", None] == norms["model.norm.weight"]
    assert len(known) == len(norms)

    lm = pa_fast.load(*PAIR, endpoint_check=False)
    pa_fast.sweep(lm, "0", zero, out, overwrite=True, figure=False)
    assert delta.load(out) is None, "--overwrite starts afresh"


def test_inspect_looks_at_the_run_before_it_measures(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pa_fast.checkpoint import inspect as module

    monkeypatch.setattr(module, "inspect", lambda *_, **__: pytest.fail("the pair was measured"))
    for pair, folder, message in (
        (PAIR, tmp_path, "is not a run folder"),
        ((PAIR[0], PAIR[0]), swept, "another pair: its instruct has the quick fingerprint"),
        ((PAIR[1], PAIR[0]), swept, "another pair: its base has the quick fingerprint"),
        ((PAIR[0], tmp_path), swept, "the folder is empty"),
    ):
        assert command(monkeypatch, "inspect", *pair, "--run", folder) == 1
        assert message in capsys.readouterr().err


def test_the_run_of_another_pair_is_refused(swept: Path, tmp_path: Path) -> None:
    report = inspect(PAIR[0], PAIR[0], sample=True)
    with pytest.raises(RunError, match="another pair: its instruct has the quick fingerprint"):
        delta.keep(report, swept)
    with pytest.raises(UsageError, match="no difference was measured"):
        delta.keep(inspect(*PAIR), swept)
    with pytest.raises(RunError, match="not a run"):
        delta.keep(report, tmp_path)
    assert not (swept / "pair.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"format": 2}',
        '{"format": 1, "base": "", "instruct": "", "is_sampled": true, "parts": 3}',
        '{"format": 1, "base": "", "instruct": "", "is_sampled": true, "parts": [{"norm": "x"}]}',
        '{"format": 1, "base": "", "instruct": "", "is_sampled": true,'
        ' "parts": [{"module": "a", "layer": 0, "norm": NaN}]}',
    ],
)
def test_a_damaged_file_is_left_out(tmp_path: Path, damage: str) -> None:
    out = runs.made(tmp_path / "run", n=60, lambdas="0,1")
    (out / "pair.json").write_text(damage)
    assert delta.load(out) is None
    write([SweepResult.load(out)])
    assert "Size of the delta" not in (out / "report.html").read_text()


def test_what_does_not_differ_is_left_empty(tmp_path: Path) -> None:
    out = runs.sized(runs.made(tmp_path / "run", n=60, lambdas="0,1"), layers=2)
    document = json.loads((out / "pair.json").read_text())
    for part in document["parts"]:
        part["norm"] *= part["module"] != "mlp.up_proj"
    (out / "pair.json").write_text(json.dumps(document))
    write([SweepResult.load(out)])
    assert "Empty: no difference." in shown((out / "report.html").read_text())


def test_numbers_are_written_where_there_is_room() -> None:
    def marks(layers: int) -> set[str]:
        rows = [{"module": "m", "layer": k, "norm": 0.1 + k} for k in range(layers)]
        return {layer["mark"]["type"] for layer in delta_sizes(rows)["layer"]}

    assert (marks(12), marks(13)) == ({"rect", "text"}, {"rect"})

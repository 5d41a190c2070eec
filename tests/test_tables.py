"""Tables at any width: no figure and no word is broken, no column is lost, and a pipe is as wide as
COLUMNS says."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pa_fast import cli
from pa_fast.cli.tables import blocks

DEMO = Path(__file__).parents[1] / "examples" / "demo"
SIDES = [str(DEMO / "pair" / side) for side in ("base", "instruct")]
FIGURE = re.compile(r"^[\d,.%–]+$")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pa-fast", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def words(text: str) -> set[str]:
    return set(re.sub("[─│┃━┏┓┗┛┡┩┳╇┴┘└┼]", " ", text).split())


@pytest.mark.parametrize("columns", [50, 60, 72, 80, 100, 120])
def test_inspect_breaks_no_figure_and_no_word(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["inspect", *SIDES, "--sample", "--fidelity", "0:1:0.1"]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run(monkeypatch, *verb) == 0
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(monkeypatch, *verb) == 0
    shown = capsys.readouterr().out
    assert words(shown) == words(wide)
    for word in ("1,020,544", "parameters", "self_attn.k_proj", "post_attention_layernorm"):
        assert word in words(shown)
    folders = [line for line in shown.splitlines() if str(DEMO) in line]
    assert len(folders) == 2, "a path stays one word, which can be copied"
    assert all(len(line) <= columns for line in shown.splitlines() if line not in folders)


def test_a_note_is_a_line_and_hides_no_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("base", "instruct"):
        shutil.copytree(DEMO / "pair" / side, tmp_path / side)
        (tmp_path / side / "tokenizer.json").unlink()
    config = tmp_path / "instruct" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    monkeypatch.setenv("COLUMNS", "80")
    sides = [str(tmp_path / side) for side in ("base", "instruct")]
    assert run(monkeypatch, "inspect", *sides, "--ignore-config", "hidden_act") == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if line.split() == ["base", "instruct"]]
    assert len(head) <= 60
    assert any(line.startswith("note: ") for line in lines)
    said = " ".join(line.strip() for line in lines)
    assert said.count("`hidden_act`") == 1
    assert "note: config.json: `hidden_act` is `silu` in base and `gelu` in instruct: ign" in said
    assert "harmless" not in said, "hidden_act changes the logits"


@pytest.mark.parametrize("columns", ["0", "", "many", "-5"])
def test_a_width_that_is_none_is_passed_over(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run(monkeypatch, "inspect", *SIDES, "--sample") == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("all ")]
    assert len(line.split()) == 7


def rendered(table: Table, width: int) -> list[str]:
    out = Console(width=10_000, file=io.StringIO())
    for block in blocks(table, width):
        out.print(block)
    return out.file.getvalue().splitlines()  # type: ignore[attr-defined]


CELLS = st.lists(
    st.sampled_from(["1,020,544", "0.2963", "31.25%", "‖I − B‖", "self_attn.k_proj", "icl:a,b=c"]),
    max_size=3,
).map(" ".join)


@given(
    st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=2, max_size=6),
    st.integers(1, 100),
    st.booleans(),
)
def test_any_table_keeps_its_words_and_its_columns(
    columns: list[list[str]], width: int, edges: bool
) -> None:
    table = Table(box=box.SIMPLE_HEAD if edges else box.HEAVY_HEAD, show_edge=edges)
    for number, column in enumerate(columns):
        table.add_column(f"{column[0]} c{number}")
    for row in zip(*(column[1:] for column in columns)):
        table.add_row(*(Text(cell) if edges else cell for cell in row))
    lines = rendered(table, width)
    shown = words(" ".join(lines))
    assert shown >= {f"c{number}" for number in range(len(columns))}
    figures = {word for column in columns for cell in column for word in cell.split()}
    assert {word for word in figures if FIGURE.match(word)} <= shown
    joined = "".join("".join(lines).split())
    assert "…" not in joined
    if width >= 40:
        assert max(map(len, lines)) <= width

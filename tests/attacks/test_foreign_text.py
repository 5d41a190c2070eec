"""Names and values of others on their way to a terminal: nothing that a terminal obeys, and no
markup, whatever the verb."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from pa_fast import cli
from pa_fast.errors import PaFastError, RunError
from pa_fast.foreign import MESSAGE_CHARACTERS, one_line, printable
from pa_fast.sweep import entry, results
from pa_fast.sweep.progress import TerminalProgress
from pa_fast.terminal import console, libraries_printable
from tests.checkpoint.pairs import CONFIG, write_pair

CODES = "\x1b[31m\x1b]0;pwned\x07\r\x7f\x9b2J\u202e\u200b\u2028\t\0"
NAME = CODES.replace("\0", "") + "[bold]b[link=evil]l:smile:"
"""May be the name of a file."""

SHOWN = r"\x1b[31m\x1b]0;pwned\x07\r\x7f\x9b2J\u202e\u200b\u2028\t"


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c != "\n"}


def hostile_pair(root: Path) -> tuple[str, str]:
    """A pair that passes; folders, keys and values of the configuration and tokens carry codes and
    markup."""
    root.mkdir()
    for side, value in zip(write_pair(root), ("base", "instruct")):
        odd = {
            "_name_or_path": CODES + value,
            f"id2label{NAME}": CODES,
            "id2label": {NAME: value + NAME},
        }
        (side / "config.json").write_text(
            json.dumps({**CONFIG, **(odd if value == "instruct" else {})})
        )
        side.rename(root / (value + NAME))
    return str(root / f"base{NAME}"), str(root / f"instruct{NAME}")


def hostile_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    column = {"name": "[bold]mine[/bold]", "higher_is_better": True, "identity": {NAME: CODES}}
    run = {
        "format": 1,
        "lambdas": ["0", "1"],
        "evaluators": [column],
        "engine": {"lossless": False, "store": NAME},
        "versions": [{NAME: CODES}],
        "configurations": [{NAME: CODES}],
    }
    (folder / "run.json").write_text(json.dumps({**run, **changes}))
    lines: list[dict[str, Any]] = [
        {
            "lambda": "0",
            "evaluator": column["name"],
            "score": 0.5,
            "unit": "[red]u[/red]",
            "n": 3,
            "host": NAME,
        },
        {
            "lambda": "1",
            "evaluator": column["name"],
            "error": f"{NAME}\n\nhint: {NAME}",
            "traceback": CODES,
        },
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["pa-fast", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert not unprintable(shown.out + shown.err), arguments
    return int(end.value.code or 0), shown.out + shown.err


@pytest.mark.draws
def test_no_verb_prints_what_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = hostile_pair(tmp_path / "pair")
    out, delta = str(tmp_path / f"out{NAME}"), str(tmp_path / f"delta{NAME}")
    runs = [str(hostile_run(tmp_path / name)) for name in (f"one{NAME}", f"two{NAME}")]
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    (tmp_path / f"rule{NAME}.yaml").write_text("- {match: 5")
    sweep = ["sweep", *pair, "--lambdas", "0", "--out", str(tmp_path / f"run{NAME}"), "--eval"]
    verbs: list[tuple[int, list[str]]] = [
        (1, ["inspect", *pair]),
        (1, ["merge", *pair, "--lambda", "0.5", "--out", out]),
    ]
    for expected, arguments in verbs:
        code, shown = run(monkeypatch, capsys, *arguments)
        assert code == expected and SHOWN in shown, arguments
    for folder in pair:  # without the key that changes a model
        (Path(folder) / "config.json").write_text(
            json.dumps({**CONFIG, "_name_or_path": folder, "id2label": {NAME: folder}})
        )
    verbs = [
        (0, ["inspect", *pair]),
        (0, ["inspect", *pair, "--json"]),
        (0, ["merge", *pair, "--lambda", "0.5", "--out", out]),
        (0, ["verify", out, *pair]),
        (1, ["verify", out, *pair, "--lambda", "0.4"]),
        (1, ["merge", *pair, "--lambda", "0.5", "--out", out]),
        (1, ["encode", *pair, "--format", "sparse", "--out", delta]),
        (1, ["lora", delta, pair[0], "--out", out + "lora"]),
        (0, ["report", *runs]),
        (1, ["report", str(tmp_path / f"none{NAME}")]),
        (2, ["merge", *pair, "--lambda", f"0{NAME}", "--out", out]),
        (
            2,
            [
                "merge",
                *pair,
                "--lambda",
                "0.5",
                "--out",
                out + "2",
                "--rule",
                str(tmp_path / f"rule{NAME}.yaml"),
            ],
        ),
        (2, ["report", f"--{NAME}"]),
        (2, [f"verb{NAME}"]),
        (1, [*sweep, f"perplexity:{tmp_path / 'no'}{NAME},name=p"]),
        (1, [*sweep, f"perplexity:{tmp_path / 'text.txt'}"]),
    ]
    for expected, arguments in verbs:
        code, shown = run(monkeypatch, capsys, *arguments)
        assert code == expected, (arguments, shown)
        assert (r"\u001b]0;pwned" if "--json" in arguments else r"\x1b]0;pwned") in shown, (
            arguments,
            shown,
        )
        if "--json" in arguments:
            assert NAME in json.loads(shown)["base"]["folder"]
    assert "[bold]mine[/bold]" in run(monkeypatch, capsys, "report", runs[0])[1]
    for file in (
        Path(out) / "README.md",
        Path(runs[0]) / "results.csv",
        Path(runs[0]) / "trajectory.svg",
    ):
        assert not unprintable(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("field", ["name", "unit", "evaluator"])
def test_a_run_whose_columns_carry_codes_is_refused(field: str, tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "run")
    if field == "name":
        text = (folder / "run.json").read_text()
        (folder / "run.json").write_text(text.replace("[bold]mine", r"\u001b]0;mine"))
        with pytest.raises(RunError, match="damaged: an evaluator is called"):
            results.load(folder)
        return
    line = {"lambda": "0", "evaluator": "a", "score": 0.5, "unit": "u", "n": 3} | {
        field: "a\x1b[2J"
    }
    with pytest.raises(ValueError, match=f"for `{field}`"):
        entry.parse(json.dumps(line).encode())


def test_messages_are_printable_and_short_wherever_they_are_made() -> None:
    error = PaFastError(f"{NAME}\nsecond line {'x' * 10**6}", CODES)
    assert not unprintable(str(error)) and "\nsecond line" in error.message
    assert len(error.message) <= MESSAGE_CHARACTERS + 100


def test_tables_notes_and_progress_show_codes_and_markup_as_text() -> None:
    from rich.table import Table
    from rich.text import Text

    for terminal in (False, True):
        out = io.StringIO()
        plain = console(width=1000)
        plain.file, plain._force_terminal = out, terminal
        table = Table(NAME, title=NAME, caption=NAME)
        table.add_row(Text(NAME + CODES, "red"))
        plain.print(table)
        progress = TerminalProgress(plain)
        progress.noted(NAME)
        progress.recorded(entry.JournalEntry("0", "[bold]e[/bold]", error=f"{NAME}\nmore"))
        shown = out.getvalue()
        assert (
            "pwned\\x07" in shown
            and "[bold]b[link=evil]l:smile:" in shown
            and "[bold]e[/bold]" in shown
        )
        assert "\x1b]" not in shown and not set("\x07\r\x9b\u202e\0") & set(shown)
        if not terminal:
            assert not unprintable(shown)


def test_what_libraries_log_and_warn_of_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    log, stream = logging.getLogger("foreign text"), io.StringIO()
    # torch sets one of its own once torch._dynamo is imported
    before = logging.getLogRecordFactory()
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    with libraries_printable():
        log.warning("a key %s", NAME)
        print(warnings.formatwarning(NAME, UserWarning, "file", 1))
    log.removeHandler(handler)
    assert "pwned" in stream.getvalue() and not unprintable(
        stream.getvalue() + capsys.readouterr().out
    )
    assert logging.getLogRecordFactory() is before


def test_ordinary_text_of_any_script_stays_as_it_is() -> None:
    for text in ("λ = 0.5 · ‖I − B‖", "日本語\u3000テキスト", "é ü ß\u00a0", "a\nb", "emoji 🎉"):
        assert printable(text) == text
    assert one_line("a\nb\ud800") == "a\\nb\\ud800"
    assert one_line("x" * 10**7, 120) == "x" * 117 + "..."

"""Rows of data files, of which people write all sorts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pa_fast.errors import EvaluatorError
from pa_fast.evals import build, parse_all
from pa_fast.evals.rows import check_distinct, read_file, read_rows


def rows_of(path: Path, text: str) -> list[tuple[str, int, Any]]:
    path.write_text(text, encoding="utf-8")
    return [
        (row.where.removeprefix(str(path)), row.number, row.fields)
        for row in read_rows(read_file(path))
    ]


def test_lines_and_lists(tmp_path: Path) -> None:
    lines = '{"a": 1}\n\n{"a": "\u2028"}\n'
    assert rows_of(tmp_path / "a.jsonl", lines) == [(":1", 1, {"a": 1}), (":3", 3, {"a": "\u2028"})]
    assert rows_of(tmp_path / "a.json", lines) == rows_of(tmp_path / "a.jsonl", lines)
    listed = json.dumps([{"a": 1}, {"a": 2}], indent=1)
    assert rows_of(tmp_path / "a.json", listed) == [
        (": row 1", 1, {"a": 1}),
        (": row 2", 2, {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", "[]", r"a\.jsonl:1: found a JSON list"),
        ("a.jsonl", '{"a": 1}\n5', r"a\.jsonl:2: found a JSON int"),
        ("a.json", '[{"a": 1}, "b"]', r"a\.json: row 2: found a JSON str"),
        ("a.json", '[{"a": 1}', r"a\.json: not JSON"),
        ("a.json", '{\n"a": 1}', r"a\.json:1: not JSON"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"a": {"b": ["\\ud800"]}}', r"a\.jsonl:1: not Unicode"),
    ],
)
def test_what_is_no_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(EvaluatorError, match=message) as caught:
        rows_of(tmp_path / name, text)
    assert caught.value.hint


@pytest.mark.parametrize("value", [None, True, 1.5, [], {}, "", " "])
def test_what_is_no_id(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": value}))
    with pytest.raises(
        EvaluatorError, match=r"a\.jsonl:1: `id` is .*, expected a text or a number"
    ):
        check_distinct(read_rows(read_file(path)))


def test_the_hint_of_a_file_that_cannot_be_read_says_what_it_is(tmp_path: Path) -> None:
    for given, hint in (
        (f"perplexity:{tmp_path}", "name the data file, not its folder"),
        (f"perplexity:{tmp_path / 'none.txt'}", "check the path of the data file"),
        (f"{tmp_path / 'none.yaml'}", "check the path of the suite"),
    ):
        with pytest.raises(EvaluatorError, match=r"none|folder|cannot be read") as caught:
            [build(spec) for spec in parse_all([given])]
        assert caught.value.hint == hint

"""Small files that would take a reader for ever, or down: each refused, or read in time that grows
with its length."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pa_fast.checkpoint.layout import ShardLog
from pa_fast.checkpoint.safetensors import parse_object
from pa_fast.errors import CheckpointError, PaFastError, RunError, UsageError
from pa_fast.evals.suite import parse_all
from pa_fast.rules import LambdaRule
from pa_fast.sweep import entry, results

LAUGHS = "\n".join(f"- &l{n} [{', '.join([f'*l{n - 1}'] * 9) if n else 'x'}]" for n in range(12))
YAML = {
    "a billion laughs": (LAUGHS, "found an alias"),
    "a list that holds itself": ("- &a [*a]", "found an alias"),
    "a mapping merged into itself": ("- &a {eval: icl, <<: *a}", "found an alias"),
    "a number in base 60": (
        "- {eval: icl, shots: 1" + ":1" * 90_000 + "}",
        "a number of 180001 characters",
    ),
    "a number of 5000 digits": (
        "- {eval: icl, shots: " + "9" * 5000 + "}",
        "a number of 5000 characters",
    ),
    "deep lists": ("[" * 100_000, "nested too deep"),
    "a long text": ("- " + "x" * 300_000, "300002 "),
}


@pytest.mark.parametrize("bomb", YAML)
@pytest.mark.parametrize("reader", ["suite", "rule"])
def test_yaml(bomb: str, reader: str, tmp_path: Path) -> None:
    text, message = YAML[bomb]
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    start = time.perf_counter()
    with pytest.raises(PaFastError) as error:
        if reader == "suite":
            parse_all([str(path)])
        else:
            LambdaRule.load(path)
    assert time.perf_counter() - start < 20, "seconds on a busy machine, not for ever"
    said = error.value.message
    assert str(path) in said and len(said) < 1000 and error.value.hint
    if reader == "suite" or "number" not in bomb:  # a rule keeps every scalar as text
        assert message in said


def test_one_name_twice_among_very_many() -> None:
    names = [f'"n{k}":0' for k in range(200_000)] + ['"n199999":1']
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="the name `n199999` appears twice"):
        parse_object(f"{{{','.join(names)}}}".encode(), "file")
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("depth", [70, 500, *range(900, 1000, 10), 100_000])
def test_documents_that_are_deep_at_any_depth(depth: int, tmp_path: Path) -> None:
    """The parser, whoever walks what it read and whoever prints it end at different depths: none of
    them may be met."""
    nested = "[" * depth + "]" * depth
    with pytest.raises(CheckpointError, match="nested too deep"):
        parse_object(f'{{"w": {{"dtype": {nested}}}}}'.encode(), "file")
    (tmp_path / "run.json").write_text(f'{{"format": {nested}}}')
    with pytest.raises(RunError, match="damaged"):
        results.load(tmp_path)
    with pytest.raises(ValueError):
        entry.parse(f'{{"lambda": {nested}}}'.encode())
    log = ShardLog(tmp_path, "job")
    log.file.write_text(f'{{"job": "job", "file": "f", "tensors": {nested}}}')
    assert log.read() == {}


def test_numbers_of_more_digits_than_python_reads(tmp_path: Path) -> None:
    digits = "9" * 5000
    with pytest.raises(CheckpointError, match="not JSON"):
        parse_object(f'{{"a": {digits}}}'.encode(), "file")
    (tmp_path / "run.json").write_text(f'{{"format": {digits}}}')
    with pytest.raises(RunError, match="damaged"):
        results.load(tmp_path)
    with pytest.raises(ValueError):
        entry.parse(f'{{"lambda": "0", "n": {digits}}}'.encode())
    for lam in (digits, json.dumps(digits)):
        with pytest.raises(UsageError):
            LambdaRule([{"match": "*", "lambda": lam}])

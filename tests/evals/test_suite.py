"""YAML suites: what an entry means, where its paths begin, and how its errors say where they
are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.errors import EvaluatorError, PaFastError, UsageError
from pa_fast.evals import build, evaluator, parse, parse_all


def suite(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_strings_and_mappings(tmp_path: Path) -> None:
    path = suite(
        tmp_path / "all.yaml",
        '- perplexity:wiki.txt,window=64\n- {eval: icl, file: few.jsonl, shots: 5, sep: "\\n",'
        " pool: more.jsonl}\n- eval: generate\n  file: ask.jsonl\n  chat: true\n  regex:"
        " '^\\d{1,3}$'\n  name: numbers, short\n- {eval: python, function: my.module:score}\n",
    )
    specs = parse_all(["python:first:one", path, "python:last:one"])
    assert [spec.column for spec in specs] == [
        "python:one",
        "perplexity:wiki,window=64",
        "icl:few,shots=5,pool=more",
        "numbers, short",
        "python:score",
        "python:one",
    ]
    assert specs[2].options == {"shots": "5", "sep": "\n", "pool": "more.jsonl"}
    assert specs[3].options == {"chat": "true", "regex": r"^\d{1,3}$", "name": "numbers, short"}
    assert specs[4].targets == ("my.module:score",)


def test_paths_begin_beside_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "suites"
    text = (
        f"- icl:few.jsonl,shots=1,pool=more.jsonl\n- {{eval: icl, file: {folder}/few.jsonl, shots:"
        " 1, pool: more.jsonl}\n"
    )
    path = suite(folder / "all.yml", text)
    row = {"prompt": "2+2=", "choices": ["4", "5"], "answer": "4"}
    (folder / "few.jsonl").write_text(json.dumps(row))
    (folder / "more.jsonl").write_text(json.dumps({**row, "prompt": "1+1=", "group": "few"}))
    for spec in parse_all([path]):
        assert build(spec).name == "icl:few,shots=1,pool=more"
    with pytest.raises(EvaluatorError, match=r"few\.jsonl cannot be read"):
        build(parse("icl:few.jsonl,shots=1,pool=more.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing, expected a list"),
        ("[]", "found nothing, expected a list"),
        ("eval: icl", "found a dict, expected a list"),
        ("just words", "found a str, expected a list"),
        ("- {eval: icl", "not YAML"),
        ("- 2020-99-99", "not YAML"),
        ("- &a [*a]", ":1: found an alias"),
        ("- icl:a.jsonl\n- 5", "entry 2: found 5, expected an EVAL string"),
        ("- icl: a.jsonl", "entry 1: found {'icl': 'a.jsonl'}"),
        ("- other.yaml", "entry 1: found 'other.yaml'"),
        ("- nothing:a", "entry 1: `nothing:a`: there is no evaluator `nothing`"),
        ("- {eval: nothing, file: a}", "entry 1: `nothing:a`: there is no evaluator `nothing`"),
        ("- {eval: icl, shots: 5}", "entry 1: `icl:shots=5`: found no file, icl takes one file"),
        ("- {eval: icl, file: [a, b]}", "entry 1: `icl:a,b`: found 2 targets, icl takes one file"),
        ("- {eval: icl, file: a, shot: 5}", "entry 1: icl has no key `shot`"),
        (
            "- {eval: icl, file: a, shots: [5]}",
            "entry 1: `shots` is [5], expected a text or a number",
        ),
        ("- {eval: icl, file: null}", "entry 1: `file` is None"),
        (
            "- icl:a.jsonl\n-\n  eval: icl\n  file: b\n  shots: 5\n  shots: 8",
            ":5: `shots` is given twice",
        ),
        ("- {eval: icl, file: a, ? [x] : 1}", ":1: a key is no plain text"),
    ],
)
def test_errors_name_file_and_entry(tmp_path: Path, text: str, message: str) -> None:
    path = suite(tmp_path / "bad.yaml", text)
    with pytest.raises(PaFastError) as caught:
        parse_all([path])
    assert caught.value.message.startswith(path)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("{eval: icl, file: gone.jsonl}", EvaluatorError, "gone.jsonl cannot be read"),
        ("icl:gone.jsonl,shots=2", EvaluatorError, "gone.jsonl cannot be read"),
        ("{eval: icl, file: a.jsonl, pool: gone.jsonl}", EvaluatorError, "gone.jsonl cannot be"),
        ("{eval: icl, file: a.jsonl, shots: 2.5}", UsageError, "shots=2.5, expected a whole"),
        ("{eval: generate, file: a.jsonl, chat: 'yes'}", UsageError, "chat=yes is not available"),
        ("{eval: generate, file: a.jsonl}", EvaluatorError, "a.jsonl:1: found the fields"),
        ("{eval: perplexity, file: a.jsonl, split: blank}", UsageError, "split=blank is for text"),
        ("{eval: python, function: no.such:f}", EvaluatorError, "module `no.such` does not import"),
        ("{eval: python, function: nothing}", UsageError, "is not module:function"),
        ("{eval: lm-eval, task: a, use_cache: x}", UsageError, "use_cache would give every λ"),
    ],
)
@pytest.mark.parametrize("name", [None, "renamed"])
def test_errors_of_the_data_name_file_and_entry_too(
    tmp_path: Path, entry: str, error: type[PaFastError], message: str, name: str | None
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    path = suite(tmp_path / "bad.yaml", f"- {entry}\n")
    with pytest.raises(error) as caught:
        evaluator(path, name=name)
    assert caught.value.message.startswith(f"{path}: entry 1: ")
    assert message in caught.value.message and caught.value.hint
    (spec,) = parse_all([path])
    with pytest.raises(error) as other:
        build(spec)
    assert other.value.message == caught.value.message


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluatorError, match=r"gone\.yaml cannot be read"):
        parse_all([str(tmp_path / "gone.yaml")])


def test_an_evaluator_of_a_yaml_file_is_no_suite() -> None:
    with pytest.raises(UsageError, match="no option `windw`"):
        parse_all(["perplexity:text.yaml,windw=5"])
    assert parse_all(["perplexity:text.yaml"])[0].target == "text.yaml"


@given(st.text("-{}[]:&*!|>'\"%@,? \n\tab5icl.eval", max_size=40))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    try:
        parse_all([suite(tmp_path_factory.mktemp("suite") / "a.yaml", text)])
    except PaFastError as error:
        assert error.hint


@pytest.mark.parametrize(
    ("text", "wrong", "meant"),
    [
        ("- {evl: icl, file: a}", "expected a key `eval`", "eval"),
        ("- {Eval: icl, file: a}", "expected a key `eval`", "eval"),
        ("- {eval: icll, file: a}", "no evaluator `icll`", "icl"),
        ("- {eval: icl, fiel: a}", "no key `fiel`", "file"),
        ("- {eval: icl, files: [a]}", "no key `files`", "file"),
        ("- {eval: lm-eval, tasks: [piqa]}", "no key `tasks`", "task"),
        ("- {eval: python, fonction: m:f}", "no key `fonction`", "function"),
        ("- {eval: icl, file: a, shot: 5}", "no key `shot`", "shots"),
        ("- {eval: icl, file: a, Shots: 5}", "no key `Shots`", "shots"),
        ("- {eval: icl, file: a, nme: b}", "no key `nme`", "name"),
    ],
)
def test_a_misspelled_key_or_evaluator_gets_the_right_one(
    tmp_path: Path, text: str, wrong: str, meant: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_all([suite(tmp_path / "bad.yaml", text)])
    assert "entry 1" in caught.value.message and wrong in caught.value.message
    assert (caught.value.hint or "").startswith(f"did you mean {meant}? ")

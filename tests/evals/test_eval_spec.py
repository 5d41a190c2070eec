"""EVAL strings: what they mean, and what they are refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.cli.runs import SWEEP_HELP
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import EXAMPLES, build, parse
from pa_fast.evals.kind import EvaluatorKind
from pa_fast.evals.spec import KINDS


@pytest.mark.parametrize(
    ("text", "name", "target", "options", "column"),
    [
        ("perplexity:a/b/wiki.txt", "perplexity", "a/b/wiki.txt", {}, "perplexity:wiki"),
        (
            "icl:few.jsonl,shots=5,mode=cloze",
            "icl",
            "few.jsonl",
            {"shots": "5", "mode": "cloze"},
            "icl:few,shots=5,mode=cloze",
        ),
        (
            "icl:few.jsonl,shots=5,sep=\\n",
            "icl",
            "few.jsonl",
            {"shots": "5", "sep": "\\n"},
            "icl:few,shots=5",
        ),
        (
            "icl:few.jsonl,pool=x/more.jsonl",
            "icl",
            "few.jsonl",
            {"pool": "x/more.jsonl"},
            "icl:few,pool=more",
        ),
        ("icl:few.jsonl,name=ICL, by me", None, None, None, None),
        (
            "icl:few.jsonl,name=ICL\\, by me",
            "icl",
            "few.jsonl",
            {"name": "ICL, by me"},
            "ICL, by me",
        ),
        ("icl:few.jsonl,sep=a=b", "icl", "few.jsonl", {"sep": "a=b"}, "icl:few,sep=a=b"),
        ("perplexity:./a=b.txt", "perplexity", "./a=b.txt", {}, "perplexity:a=b"),
        ("python:my.module:score", "python", "my.module:score", {}, "python:score"),
        (
            "generate:a/b.jsonl,regex=^\\d{1\\,3}$",
            "generate",
            "a/b.jsonl",
            {"regex": r"^\d{1,3}$"},
            "generate:b",
        ),
        (
            "generate:b.jsonl,regex=yes|no",
            "generate",
            "b.jsonl",
            {"regex": "yes|no"},
            "generate:b,regex=yes|no",
        ),
        (
            "alpaca:all.json,chat=false",
            "alpaca",
            "all.json",
            {"chat": "false"},
            "alpaca:all,chat=false",
        ),
    ],
)
def test_parse(
    text: str,
    name: str | None,
    target: str | None,
    options: dict[str, str] | None,
    column: str | None,
) -> None:
    if name is None:
        with pytest.raises(UsageError, match="not key=value"):
            parse(text)
        return
    spec = parse(text)
    assert (spec.name, spec.target, spec.options, spec.column) == (name, target, options, column)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("lmeval:piqa", "no evaluator `lmeval`", "evaluators: perplexity, icl, generate, alpaca, "),
        ("", "no evaluator ``", "perplexity"),
        ("perplexity", "found no file, perplexity takes one file", "FILE.txt"),
        ("icl:", "found no file, icl takes one file", "FILE.jsonl"),
        ("icl:,shots=5", "found no file, icl takes one file", "FILE.jsonl"),
        ("python:", "found no function, python takes one function", "function"),
        ("lm-eval:", "found no task, lm-eval takes one task or more", "piqa,arc_easy"),
        ("lm-eval:piqa,", "an empty part beside a comma", "piqa,arc_easy"),
        ("icl:shots=5", "found no file, icl takes one file", "FILE.jsonl"),
        ("icl:a.jsonl,b.jsonl", "found 2 targets, icl takes one file", "FILE.jsonl"),
        ("suite.yaml", "no evaluator `suite.yaml`", "icl"),
        (
            "icl:a.jsonl,shot=5",
            "no option `shot`",
            "did you mean shots? options of icl: shots, mode, ",
        ),
        ("python:a:b,shots=5", "no option `shots`", "options of python: name"),
        ("icl:a.jsonl,shots=5,shots=6", "given twice", "once"),
        ("icl:a.jsonl,,shots=5", "an empty part beside a comma", "FILE.jsonl"),
        ("icl:a.jsonl,name=a/b", "cannot be a column", "name="),
        ("icl:a.jsonl,name=a\nb", "cannot be a column", "name="),
        ("icl:a.jsonl,name=", "cannot be a column", "name="),
    ],
)
def test_refused_with_what_is_allowed(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert message in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("shots=-1", "shots=-1"),
        ("shots=five", "shots=five"),
        ("shots=²", "shots=²"),
        ("mode=letters", "mode=letters is not available"),
        ("mode=letter,norm=none", "norm= means nothing with mode=letter"),
        ("until=x", "until= means nothing with mode=cloze"),
        ("mode=letter,max_new_tokens=4", "max_new_tokens= means nothing with mode=letter"),
        ("mode=generate,until=", "until= is empty"),
        ("mode=generate,max_new_tokens=0", "max_new_tokens=0"),
        ("norm=token", "norm=token is not available"),
    ],
)
def test_option_values(tmp_path: Path, options: str, message: str) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    with pytest.raises(UsageError, match=message):
        build(f"icl:{data},{options}")


@pytest.mark.parametrize(
    "options", ["window=1", "window=0", "stride=0", "window=8,stride=8", "split=line", "stride=x"]
)
def test_perplexity_values(tmp_path: Path, options: str) -> None:
    data = tmp_path / "a.txt"
    data.write_text("text")
    with pytest.raises(UsageError):
        build(f"perplexity:{data},{options}")


def test_a_stride_of_the_whole_window_is_told_the_largest_there_is(tmp_path: Path) -> None:
    data = tmp_path / "a.txt"
    data.write_text("text")
    with pytest.raises(
        UsageError, match="window 8, stride 8; expected 1 ≤ stride < window"
    ) as caught:
        build(f"perplexity:{data},window=8,stride=8")
    assert "stride 7" in str(caught.value.hint)
    build(f"perplexity:{data},window=8,stride=7")


def test_limit_must_leave_something(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="limit of 0"):
        build(f"perplexity:{tmp_path / 'a.txt'}", limit=0)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluatorError, match=r"gone\.txt cannot be read"):
        build(f"perplexity:{tmp_path / 'gone.txt'}")


def test_examples_parse() -> None:
    assert [parse(example).name for example in EXAMPLES.values()] == list(EXAMPLES)


def test_more_than_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(*_: object) -> Any:
        raise AssertionError("parsing builds nothing")

    kind = EvaluatorKind(
        "many", "task", "many:piqa,arc_easy", ("shots",), unused, many=True, label=str
    )
    monkeypatch.setitem(KINDS, "many", kind)
    spec = parse("many:piqa,arc.easy,shots=5")
    assert (spec.targets, spec.options, spec.column) == (
        ("piqa", "arc.easy"),
        {"shots": "5"},
        "many:piqa,arc.easy,shots=5",
    )
    with pytest.raises(UsageError, match="found no task, many takes one task or more"):
        parse("many:shots=5")
    with pytest.raises(UsageError, match="`arc_easy` after an option"):
        parse("many:piqa,shots=5,arc_easy")


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: str(kind.name))
def test_the_help_shows_every_evaluator_and_option(kind: EvaluatorKind) -> None:
    lines = [line.strip().removeprefix("EVAL").strip() for line in SWEEP_HELP.split("\n")]
    examples = [line for line in lines if line.startswith(f"{kind.name}:")]
    assert [parse(example).name for example in examples] == [kind.name]
    # use_cache is known in order to be refused with its reason
    missing = [
        option
        for option in kind.options
        if f"{option}=" not in SWEEP_HELP and option != "use_cache"
    ]
    assert not missing, missing


PIECES = [
    "icl",
    "perplexity",
    "generate",
    "alpaca",
    "python",
    ":",
    ",",
    "=",
    "\\",
    "name",
    "shots",
    "a/b.jsonl",
    "\n",
    "5",
    "",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        spec = parse(text)
    except UsageError as error:
        assert error.hint
        return
    assert spec.column
    assert not set(spec.column) & set("/\\\n\r\0")


@given(st.text(max_size=20).filter(lambda text: "\\" not in text), st.integers(0, 99))
def test_values_survive_quoting(value: str, shots: int) -> None:
    spec = parse(f"icl:a.jsonl,shots={shots},sep=" + value.replace(",", "\\,"))
    assert spec.options == {"shots": str(shots), "sep": value}

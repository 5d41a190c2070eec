"""Evaluators that could not run at any λ: one message with counts before the first one, and options
that mend it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pa_fast import cli
from pa_fast.base import complete_evaluator
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import build
from pa_fast.sweep.driver import check_evaluators
from tests.evals.test_icl import write
from tests.evals.toy import Characters, Chatting, ToyEngine

CHOICES: dict[str, Any] = {"choices": ["yes", "no"], "answer": 0}
SHORT, LONG = {"prompt": "x" * 5, **CHOICES}, {"prompt": "a" + "x" * 28, **CHOICES}
ASKED = [{"prompt": prompt, "answer": "y"} for prompt in ("x" * 5, "x" * 30, "x" * 40)]
TOLD = [{"instruction": "x" * size} for size in (5, 30, 40)]


def engine(positions: int | None = 24, tokenizer: Characters | None = None) -> ToyEngine:
    return ToyEngine(
        tokenizer=tokenizer or Characters(), positions=positions, says=lambda prompt: "yyyyy"
    )


def bare() -> Chatting:
    tokenizer = Chatting()
    tokenizer.chat_template = None
    return tokenizer


DOOMED: dict[str, tuple[str, list[Any], Callable[[], ToyEngine], str]] = {
    "icl-cloze": (
        "icl:{},shots=0",
        [SHORT, LONG, LONG],
        engine,
        r"2 of 3 items do not fit .* 24 tokens: .*:2, takes 32",
    ),
    "icl-letter": ("icl:{},shots=0,mode=letter", [SHORT] * 2, engine, r"2 of 2 items do not fit"),
    "icl-shots": (
        "icl:{},shots=4",
        [{**SHORT, "prompt": f"{n}: x"} for n in range(9)],
        engine,
        r"5 of 5 items do not fit",
    ),
    "icl-generate": (
        "icl:{},shots=0,mode=generate,max_new_tokens=64",
        [SHORT] * 2,
        engine,
        r"2 of 2 items do not fit .* takes 70",
    ),
    "generate-prompts": (
        "generate:{},max_new_tokens=4",
        ASKED,
        engine,
        r"2 of 3 items do not fit .*:3, takes 45",
    ),
    "generate-new-tokens": (
        "generate:{},max_new_tokens=256",
        ASKED[:1],
        engine,
        r"1 of 1 items do not fit .* takes 262",
    ),
    "alpaca-prompts": (
        "alpaca:{},chat=false",
        TOLD,
        engine,
        r"2 of 3 items do not fit .*:3, takes 42",
    ),
    "perplexity-window": (
        "perplexity:{},window=30",
        [{"text": "x" * 99}] * 2,
        engine,
        r"2 of 2 items .* takes 29",
    ),
    "perplexity-stride": (
        "perplexity:{},stride=30",
        [{"text": "x" * 99}],
        engine,
        r"window 24, stride 30; .* stride < window: the model has positions for 24 tokens",
    ),
    "perplexity-empty": (
        "perplexity:{}",
        [{"text": "x"}] * 2,
        lambda: engine(tokenizer=Characters(bos=False)),
        r"no token to score .* of 2 that",
    ),
    "generate-template": (
        "generate:{},chat=true",
        ASKED,
        lambda: engine(None, bare()),
        r"no chat template .* of 3 that",
    ),
    "alpaca-template": (
        "alpaca:{}",
        TOLD,
        lambda: engine(None, bare()),
        r"no chat template .* of 3 that",
    ),
    "template-refuses": (
        "generate:{},chat=true",
        [{"messages": [{"role": "tool", "content": "5"}], "answer": "x"}] * 2,
        lambda: engine(None, Chatting()),
        (
            r":1: the chat template refuses it: no tools here \(the first of 2 that are refused, of"
            r" 2 items\)"
        ),
    ),
    "nothing-before-the-answer": (
        "icl:{},shots=0",
        [{"prompt": "a", "choices": ["b", "c"], "answer": 0}] * 2,
        lambda: engine(tokenizer=Characters(bos=False, merges=["ab"])),
        r":1: `b` after `a` leaves 0 tokens of context .* of 2 that are refused",
    ),
}


@pytest.mark.parametrize("way", DOOMED)
def test_ways_to_be_doomed(tmp_path: Path, way: str) -> None:
    text, rows, make, message = DOOMED[way]
    evaluator = build(text.format(write(tmp_path / "a.jsonl", rows)))
    on = make()
    with pytest.raises(EvaluatorError, match=message) as caught:
        check_evaluators(on, [evaluator])
    assert caught.value.message.startswith(f"evaluator `{evaluator.name}`: ")
    assert caught.value.hint and "again" not in caught.value.hint
    assert not on.asked and not on.prompted, "the model was not asked"
    if on.positions is not None and "do not fit" in message:  # type: ignore[attr-defined]
        notes = check_evaluators(engine(10_000, make().tokenizer), [evaluator])
        assert not [note for note in notes if "held out" not in note], (
            "a larger model has room for it"
        )


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        (
            "icl:{},shots=0",
            {"q": "x", "choices": ["a", "b"], "answer": 0},
            "expected `prompt` or `question`",
        ),
        ("icl:{},shots=0", {"question": "x", "answer": "a"}, "found no choices"),
        ("generate:{}", {"text": "x"}, "expected either `prompt` or `messages`"),
        ("generate:{}", {"prompt": "x"}, "no rule that scores its output"),
        ("alpaca:{}", {"prompt": "x"}, "expected `instruction`"),
        ("perplexity:{}", {"content": "x"}, "found no text in the field `text`"),
    ],
)
def test_wrong_columns_are_counted(
    tmp_path: Path, text: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(
        EvaluatorError, match=rf"a\.jsonl:1: .*{message}.* \(the first of 7 that are refused, of 7 "
    ):
        build(text.format(write(tmp_path / "a.jsonl", [row] * 7)))


def test_all_doomed_evaluators_are_named_at_once(tmp_path: Path) -> None:
    one = build(f"icl:{write(tmp_path / 'a.jsonl', [LONG])},shots=0")
    other = build(f"perplexity:{write(tmp_path / 'b.jsonl', [{'text': 'x' * 99}])},window=30")
    with pytest.raises(
        EvaluatorError,
        match=(
            r"(?s)2 evaluators cannot run:.*`icl:a,shots=0`: 1 of 1.*`perplexity:b,window=30`: 1 of"
        ),
    ):
        check_evaluators(engine(), [one, other])


def scores(text: str, on: ToyEngine) -> Any:
    return build(text)(on)


def test_skip_leaves_items_out_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [SHORT, LONG, SHORT])
    evaluator = build(f"icl:{path},shots=0,overflow=skip")
    assert check_evaluators(engine(), [evaluator]) == [
        "icl:a,shots=0,overflow=skip: 1 of 3 items are too long for 24 positions and are left out"
    ]
    score = evaluator(engine())
    assert ([item.id for item in score.items], score.n, score.details["items_skipped"]) == (
        ["1", "3"],
        2,
        1,
    )
    with pytest.raises(EvaluatorError, match=r"1 of 1 items do not fit .*even with overflow=skip"):
        check_evaluators(engine(), [build(f"icl:{write(path, [LONG])},shots=0,overflow=skip")])
    for text, rows in (
        ("generate:{},max_new_tokens=4", ASKED),
        ("alpaca:{},chat=false", TOLD),
        ("perplexity:{},window=30", [{"text": "x" * size} for size in (9, 99, 99)]),
    ):
        score = scores(text.format(write(path, rows)) + ",overflow=skip", engine())
        assert (score.n, score.details["items_skipped"]) == (1, 2)


def test_truncate_keeps_bos_and_the_end_of_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [LONG])
    on = engine()
    score = scores(f"icl:{path},shots=0,overflow=truncate", on)
    assert [len(context) + len(answer) - 1 for context, answer in on.asked[0]] == [24, 23]
    assert [on.tokenizer.decode(context + answer) for context, answer in on.asked[0]] == [
        "\x01" + "x" * 21 + "yes",
        "\x01" + "x" * 21 + "no",
    ]
    assert score.details["prompts_truncated"] == 1
    scores(f"generate:{write(path, ASKED)},max_new_tokens=4,overflow=truncate", on)
    assert [on.tokenizer.decode(ids) for ids in on.prompted[0]] == [
        "\x01xxxxx",
        "\x01" + "x" * 19,
        "\x01" + "x" * 19,
    ]
    endless = {"prompt": "x", "choices": ["y" * 30, "z"], "answer": 0}
    with pytest.raises(EvaluatorError, match="even with overflow=truncate"):
        check_evaluators(
            engine(), [build(f"icl:{write(path, [endless])},shots=0,overflow=truncate")]
        )


@pytest.mark.parametrize("mode", ["cloze", "generate,max_new_tokens=4"])
def test_fewer_shots_shows_as_many_as_fit(tmp_path: Path, mode: str) -> None:
    pool = [
        {"prompt": f"{n}:", "answer": "yes", "split": "pool", "choices": ["yes", "no"]}
        for n in range(9)
    ]
    path = write(
        tmp_path / "a.jsonl",
        [{**SHORT, "prompt": "short="}, {**SHORT, "prompt": "a longer one="}, *pool],
    )
    on = engine()
    score = scores(f"icl:{path},shots=3,sep=;,mode={mode},overflow=fewer-shots", on)
    prompts = [
        on.tokenizer.decode(ids)
        for ids in (on.prompted[0] if on.prompted else [pair[0] for pair in on.asked[0][::2]])
    ]
    assert [prompt.count(";") for prompt in prompts] == [2, 1]
    assert prompts[1].endswith(";a longer one=") and score.details["items_with_fewer_shots"] == 2
    with pytest.raises(EvaluatorError, match="even with overflow=fewer-shots"):
        write(path, [LONG, *pool])
        check_evaluators(on, [build(f"icl:{path},shots=3,sep=;,overflow=fewer-shots")])


def test_policies_are_those_that_mean_something(tmp_path: Path) -> None:
    for text in ("generate:{}", "alpaca:{}", "perplexity:{}"):
        with pytest.raises(UsageError, match="overflow=fewer-shots is not available"):
            build(
                text.format(write(tmp_path / "a.jsonl", [{**ASKED[0], **TOLD[0], "text": "x"}]))
                + ",overflow=fewer-shots"
            )


def test_the_default_window_is_what_the_model_has_positions_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 2000}])
    for positions, window in ((24, 24), (512, 512), (4096, 512), (None, 512)):
        on = engine(positions)
        evaluator = build(f"perplexity:{path}")
        assert len(check_evaluators(on, [evaluator])) == (window < 512)
        score = evaluator(on)
        assert score.unit == f"perplexity, window {window}"
        assert max(len(context) + len(answer) for context, answer in on.asked[0]) == window
    assert build(f"perplexity:{path}").identity != build(f"perplexity:{path},window=512").identity
    cut = scores(f"perplexity:{path},window=30,overflow=truncate", engine())
    assert cut.unit == "perplexity, window 24"
    assert cut.value == scores(f"perplexity:{path},window=24", engine()).value


WRITING = ["alpaca:{},chat=false", "generate:{}", "icl:{},shots=0,mode=generate"]


@pytest.mark.parametrize("text", WRITING)
def test_new_tokens_that_nobody_asked_for_are_capped_at_what_fits(
    tmp_path: Path, text: str
) -> None:
    rows = [{"prompt": "x" * 5, "answer": "y", "instruction": "x" * 5}]
    evaluator = build(text.format(write(tmp_path / "a.jsonl", rows)))
    on = engine()
    [note] = check_evaluators(on, [evaluator])
    assert "answers have at most 18 tokens, not" in note and "a.jsonl:1, of 6 tokens" in note
    score = evaluator(on)
    assert (on.configs[0].max_new_tokens, score.details["max_new_tokens"]) == (18, 18)
    assert "max_new_tokens" not in evaluator(engine(None)).details
    if not text.startswith("alpaca"):  # its 2048 are a cap in either case
        given = complete_evaluator(evaluator).identity["max_new_tokens"].removesuffix(" at most")
        asked = build(f"{text.format(tmp_path / 'a.jsonl')},max_new_tokens={given}")
        assert complete_evaluator(asked).identity != complete_evaluator(evaluator).identity
        with pytest.raises(EvaluatorError, match="do not fit"):
            check_evaluators(engine(), [asked])


@pytest.mark.parametrize("text", WRITING)
def test_a_prompt_that_is_cut_leaves_more_than_one_new_token(tmp_path: Path, text: str) -> None:
    rows = [{"prompt": "x" * n, "answer": "y", "instruction": "x" * n} for n in (5, 22, 40)]
    path = write(tmp_path / "a.jsonl", rows)
    on = engine()
    for overflow, kept, prompt in (("skip", 1, 6), ("truncate", 3, 18)):
        score = scores(f"{text.format(path)},overflow={overflow}", on)
        assert (score.n, max(map(len, on.prompted[-1]))) == (kept, prompt)
        assert on.configs[-1].max_new_tokens == 24 - prompt


TOO_LONG = [
    (f"{kind}{more}", rows)
    for kind, more, rows in (
        *(
            ("generate:{}", f",max_new_tokens={most}", ASKED[:count])
            for most in (4, 16, 24, 300)
            for count in (1, 2, 3)
        ),
        ("generate:{}", "", ASKED),
        ("generate:{}", "", ASKED[2:]),
        ("alpaca:{}", ",chat=false", TOLD),
        ("alpaca:{}", ",chat=false", TOLD[2:]),
        *(
            ("icl:{}", f",shots={shots},sep=;,mode={mode}", rows)
            for shots in (0, 3)
            for mode in ("cloze", "generate", "generate,max_new_tokens=4,until=;")
            for rows in ([SHORT, LONG], [LONG], [{**SHORT, "prompt": "x" * 15}])
        ),
        ("icl:{}", ",shots=0", [{**SHORT, "choices": ["y" * 30, "z"]}]),
        ("icl:{}", ",shots=0", [SHORT, {**SHORT, "choices": ["y" * 30, "z"]}]),
        ("perplexity:{}", ",window=30", [{"text": "x" * 99}]),
        ("perplexity:{}", ",window=30", [{"text": "x" * 99}, {"text": "x" * 9}]),
        ("perplexity:{}", ",window=30,stride=25", [{"text": "x" * 99}]),
    )
]
POOL = [{**SHORT, "prompt": f"{n}:", "split": "pool"} for n in range(9)]


@pytest.mark.parametrize("text,rows", TOO_LONG, ids=[f"{t}-{len(r)}" for t, r in TOO_LONG])
def test_every_way_that_a_hint_offers_is_one(
    tmp_path: Path, text: str, rows: list[dict[str, Any]]
) -> None:
    path = write(tmp_path / "a.jsonl", [*rows, *(POOL if ",shots=3" in text else [])])
    policies = ("refuse", "skip", "truncate", "fewer-shots")
    offered = 0
    for policy in policies if text.startswith("icl") else policies[:-1]:
        asked = with_options(text.format(path), f"overflow={policy}")
        try:
            check_evaluators(engine(), [build(asked)])
            continue
        except EvaluatorError as error:
            hint = error.hint or ""
            if "expected 1 ≤ stride < window: the model has" in error.message:
                continue
        for way in hint.split("; or "):
            options = re.findall(r"\S+=[\w-]+(?:,\S+=[\w-]+)*|shots=", way)
            assert len(options) == 1 or way.startswith("shorten them"), hint
            for option in options:
                option = "shots=0" if option == "shots=" else option
                check_evaluators(engine(), [build(with_options(asked, option))])
                offered += 1
        if policy == "refuse" and len(rows) > 1:
            assert offered, "something can be done, as some items are short"


def with_options(text: str, more: str) -> str:
    """The EVAL `text` with options put in place of its own."""
    changed = dict(option.split("=", 1) for option in more.split(","))
    target, *options = text.split(",")
    return ",".join([target, *(o for o in options if o.split("=")[0] not in changed), more])


def test_what_can_work_is_said_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ASKED[:1])
    with pytest.raises(EvaluatorError) as caught:
        check_evaluators(engine(), [build(f"generate:{path},max_new_tokens=256")])
    assert caught.value.hint == "max_new_tokens=18 or less leaves room behind every prompt"
    write(path, [*POOL, SHORT, LONG])
    for policy in ("refuse", "fewer-shots"):
        with pytest.raises(EvaluatorError) as caught:
            check_evaluators(engine(), [build(f"icl:{path},shots=2,sep=;,overflow={policy}")])
        assert ":11, takes 44, and 32 without shots" in caught.value.message
        assert "fewer" not in (caught.value.hint or "")


def test_items_that_only_shots_make_askable_are_too_long_all_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}]
    path = write(tmp_path / "a.jsonl", [*POOL, *rows])
    on = engine(8, Characters(bos=False, merges=["ab"]))
    with pytest.raises(EvaluatorError, match=r"1 of 1 items do not fit .* takes 10\n") as caught:
        check_evaluators(on, [build(f"icl:{path},shots=1,sep=;;;;")])
    assert "shots" not in (caught.value.hint or "") and "truncate" in (caught.value.hint or "")


def test_windows_that_are_truncated_are_called_what_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 99}])
    with pytest.raises(EvaluatorError) as caught:
        check_evaluators(engine(), [build(f"perplexity:{path},window=30")])
    assert "prompt" not in str(caught.value)
    assert (caught.value.hint or "").startswith("overflow=truncate takes windows of 24 tokens")
    evaluator = build(f"perplexity:{path},window=30,overflow=truncate")
    assert evaluator.name == "perplexity:a,window=30 at most,overflow=truncate"
    assert evaluator(engine()).unit == "perplexity, window 24"
    assert evaluator(engine(None)).unit == "perplexity, window 30"
    assert build(f"perplexity:{path},window=30").name == "perplexity:a,window=30"


GROUPED = [
    {"group": group, "prompt": f"{group}{n}", "choices": ["y", "n"], "answer": 0}
    for group in "ab"
    for n in range(3)
]


@pytest.mark.parametrize("kind", ["macro", "micro"])
def test_groups_or_items_count_the_same(tmp_path: Path, kind: str) -> None:
    # a2, b0, b1, b2
    right = [
        {**row, "answer": "y", "instruction": row["prompt"], "dataset": row["group"]}
        for row in GROUPED[2:]
    ]
    path = write(tmp_path / "a.jsonl", right)
    value = 0.5 if kind == "macro" else 0.25
    likes_a = ToyEngine(lambda context, token: float((chr(token) == "y") == (ord("a") in context)))
    says_a = ToyEngine(
        says=lambda prompt: "y" if "a" in prompt else "nnnnnnnnnnn", tokenizer=Characters()
    )
    for text, on, unit in (
        ("icl:{},shots=0", likes_a, "accuracy (per character)"),
        ("icl:{},shots=0,mode=generate", says_a, "exact match"),
        ("generate:{}", says_a, "exact match"),
        ("alpaca:{},chat=false,max_new_tokens=9", says_a, "share of answers that end"),
    ):
        default = [] if kind == "macro" else [f",average={kind}"]
        score = scores(text.format(path) + "".join(default), on)
        assert (score.value, score.unit) == (value, f"{unit}, {kind}")
    texts = [{"text": "aaaa", "group": "a"}, {"text": "b", "group": "b"}]
    on = ToyEngine(lambda context, token: -1.0 if token == ord("a") else -2.0)
    score = scores(f"perplexity:{write(path, texts)},average={kind}", on)
    assert score.value == pytest.approx(math.exp(1.5 if kind == "macro" else 6 / 5))
    assert score.unit == f"perplexity, window 512, {kind}"


def test_average_and_overflow_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    for text in (
        "icl:{},shots=0",
        "icl:{},shots=0,mode=generate",
        "generate:{}",
        "alpaca:{}",
        "perplexity:{}",
    ):
        row = (
            {"text": "x"}
            if text.startswith("perplexity")
            else {**GROUPED[0], "answer": "y", "instruction": "x"}
        )
        path = write(tmp_path / "a.jsonl", [row])
        found = [
            build(text.format(path) + more).identity
            for more in ("", ",average=micro", ",overflow=skip")
        ]
        assert len({json.dumps(one, sort_keys=True) for one in found}) == 3
        assert found[0] == build(text.format(path) + ",average=macro,overflow=refuse").identity


def test_ties_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "choices": choices, "answer": 0}
        for choices in (["ab", "cd"], ["ab", "c"], ["ab", "ab", "c"])
    ]
    path = write(tmp_path / "a.jsonl", rows)
    even = ToyEngine(lambda context, token: -1.0)
    assert scores(f"icl:{path},shots=0", even).details["ties"] == 3, "per character all are alike"
    assert scores(f"icl:{path},shots=0,norm=none", even).details["ties"] == 1, (
        "equal texts are one choice"
    )


@pytest.mark.parametrize(
    "text",
    [
        "icl:{},shots=0",
        "icl:{},shots=0,mode=generate",
        "generate:{}",
        "alpaca:{},chat=false",
        "perplexity:{}",
    ],
)
def test_a_limit_is_that_many_items_spread_over_groups(tmp_path: Path, text: str) -> None:
    asked = (
        {"text": "x"}
        if text.startswith("perplexity")
        else {"prompt": "x", "choices": ["y", "n"], "answer": "y", "instruction": "x"}
    )
    rows = [
        {"group": group, "dataset": group, **asked}
        for group, count in (("a", 20), ("b", 2), ("c", 5))
        for _ in range(count)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    for limit, shares in ((9, [4, 2, 3]), (3, [1, 1, 1]), (24, [17, 2, 5]), (100, [20, 2, 5])):
        score = build(text.format(path), limit=limit)(ToyEngine())
        assert [sum(item.group == group for item in score.items) for group in "abc"] == shares
        assert score.n == min(limit, 27)


DEMO = Path(__file__).parents[2] / "examples" / "demo"
PAIR = (str(DEMO / "pair" / "base"), str(DEMO / "pair" / "instruct"))


def sweep(monkeypatch: pytest.MonkeyPatch, out: Path, *evals: str) -> int:
    arguments = ["sweep", *PAIR, "--lambdas", "0,0.5,1", "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(
        sys, "argv", ["pa-fast", *arguments, *(part for one in evals for part in ("--eval", one))]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_whole_sweep_of_a_model_of_256_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("abc>cba " * 80)
    instructions = write(tmp_path / "told.json", [{"instruction": "rev abc"}])
    fine = [f"perplexity:{tmp_path}/notes.txt", f"alpaca:{instructions},chat=false"]
    out = tmp_path / "run"
    assert (
        sweep(
            monkeypatch, tmp_path / "doomed", *fine, f"perplexity:{tmp_path}/notes.txt,window=512"
        )
        == 1
    )
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "1 of 1 items do not fit the model, which has positions for 256 tokens" in said
        and "again" not in said
    )
    assert not (tmp_path / "doomed").exists()
    assert sweep(monkeypatch, out, fine[0]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {(row["evaluator"], row["unit"]) for row in rows} == {
        ("perplexity:notes", "perplexity, window 256")
    }


def test_no_hint_says_to_run_again_what_fails_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "always_wrong.py").write_text("def score(engine):\n    raise KeyError('column')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sweep(monkeypatch, tmp_path / "run", "python:always_wrong:score") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("failed: KeyError") == 2 and "not tried at further λ" in said
    assert "once more" not in said and "mend what the message names, then run" in said

"""Generated answers: what the model is shown, which rule scores it, what is kept, and which rows
are refused."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals import build
from tests.evals.test_icl import write
from tests.evals.toy import Characters, Chatting, ToyEngine

ROWS: list[dict[str, Any]] = [
    {"id": "sum", "group": "maths", "prompt": "2+2=", "answer": "4"},
    {"id": "up", "prompt": "shout", "regex": "^[A-Z]+$"},
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def scores(evaluator: Any, says: Any) -> list[float]:
    return [item.score for item in evaluator(ToyEngine(says=says)).items]


def test_prompts_outputs_and_scores(tmp_path: Path) -> None:
    evaluator = build(f"generate:{write(tmp_path / 'a.jsonl', ROWS)},max_new_tokens=6")
    engine = ToyEngine(says=lambda prompt: " 4.\x02 ignored" if "2" in prompt else "HEY THERE")
    score = evaluator(engine)
    assert engine.prompted[0] == [[1, *map(ord, "2+2=")], [1, *map(ord, "shout")]]
    assert (engine.configs[0].max_new_tokens, engine.configs[0].stop) == (6, (2,))
    assert [(item.id, item.group, item.score) for item in score.items] == [
        ("sum", "maths", 1.0),
        ("up", "a", 0.0),
    ]
    assert (score.value, score.unit, score.n) == (0.5, "share right, macro", 2)
    assert score.details == {"truncated": 0.5, "mean_output_tokens": 4.5}
    assert [json.loads(line) for line in score.files["outputs.jsonl"].splitlines()] == [
        {
            "id": "sum",
            "group": "maths",
            "prompt": "2+2=",
            "output": " 4.",
            "truncated": False,
            "score": 1.0,
        },
        {
            "id": "up",
            "group": "a",
            "prompt": "shout",
            "output": "HEY TH",
            "truncated": True,
            "score": 0.0,
        },
    ]


def test_stop_tokens_are_those_of_both_models(tmp_path: Path) -> None:
    engine = ToyEngine(says=lambda prompt: "ab", stop_tokens=[ord("b"), 2])
    score = build(f"generate:{write(tmp_path / 'a.jsonl', ROWS)}")(engine)
    assert engine.configs[0].stop == (ord("b"), 2)
    assert '"output": "a"' in score.files["outputs.jsonl"]


def test_the_chat_template_writes_the_special_tokens(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{"prompt": "Hi", "answer": "x"}, {"messages": MESSAGES, "answer": "x"}],
    )
    engine = ToyEngine(tokenizer=Chatting())
    score = build(f"generate:{path},chat=true")(engine)
    texts = ["\x01<user>Hi<assistant>", "\x01<system>Be brief.<user>Hi<assistant>"]
    assert engine.prompted[0] == [list(map(ord, text)) for text in texts], (
        "one BOS, which the template writes"
    )
    assert [
        json.loads(line)["prompt"] for line in score.files["outputs.jsonl"].splitlines()
    ] == texts


def test_no_chat_template(tmp_path: Path) -> None:
    evaluator = build(f"generate:{write(tmp_path / 'a.jsonl', ROWS)},chat=true")
    tokenizer = Chatting()
    tokenizer.chat_template = None
    for without in (Characters(), tokenizer):
        with pytest.raises(EvaluatorError, match="the tokenizer has no chat template") as caught:
            evaluator(ToyEngine(tokenizer=without))
        assert "--tokenizer" in str(caught.value.hint)


def test_a_template_that_refuses_names_the_row(tmp_path: Path) -> None:
    rows = [ROWS[0], {"messages": [{"role": "tool", "content": "5"}], "answer": "x"}]
    evaluator = build(f"generate:{write(tmp_path / 'a.jsonl', rows)},chat=true")
    with pytest.raises(
        EvaluatorError, match=r"a\.jsonl:2: the chat template refuses it: no tools here"
    ):
        evaluator(ToyEngine(tokenizer=Chatting()))


def test_rules(tmp_path: Path) -> None:
    row = {"prompt": "x"}
    path = write(
        tmp_path / "a.jsonl",
        [
            {**row, "regex": "(?i)YES"},
            {**row, "regex": r"\bno\b", "answer": "no"},
            {**row, "answer": ["No!", "nope"]},
            row,
        ],
    )
    with pytest.raises(
        EvaluatorError, match=r"a\.jsonl:4: found the fields \['prompt'\], and no rule"
    ):
        build(f"generate:{path}")
    evaluator = build(f"generate:{path},regex=o$")
    assert scores(evaluator, lambda _: "yes, no") == [1.0, 1.0, 1.0, 1.0]
    assert scores(evaluator, lambda _: "nope") == [0.0, 0.0, 0.0, 0.0], "regex= goes before answers"
    assert scores(evaluator, lambda _: "no") == [0.0, 1.0, 1.0, 1.0], "and after a row's own"
    assert evaluator(ToyEngine()).unit == "regex match"
    only = build(f"generate:{write(path, [{**row, 'answer': ['No!', 'nope']}])}")
    assert scores(only, lambda _: "nope") == scores(only, lambda _: " no\n") == [1.0]
    assert scores(only, lambda _: "no, never") == [0.0]
    assert only(ToyEngine()).unit == "exact match"


CHECKER = """
def shorter(output, row):
    return len(output) / row["most"]

def polite(output, row):
    return "please" in output

def picky(output, row):
    return row["nothing of that name"]

def wordy(output, row):
    return "1"

def late(output, row):
    assert output == "" or row["prompt"] == "a"
    return 1

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    name = f"checks_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CHECKER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/nowhere")
    return name


def test_a_checker_scores_every_row(tmp_path: Path, module: str) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{"prompt": "a", "most": 4}, {"prompt": "b", "most": 8, "answer": "x", "regex": "("}],
    )
    evaluator = build(f"generate:{path},check={module}:shorter")
    score = evaluator(ToyEngine(says=lambda _: "12"))
    assert ([item.score for item in score.items], score.unit) == ([0.5, 0.25], "mean of shorter")
    assert scores(
        build(f"generate:{path},check={module}:polite"), lambda prompt: "please" * prompt.count("a")
    ) == [1.0, 0.0]


def test_a_checker_that_fails_does_so_before_a_model_is_loaded(tmp_path: Path, module: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    for name, message in {
        "picky": r"a\.jsonl:1: .*:picky failed: KeyError: 'nothing of that name'",
        "wordy": r"a\.jsonl:1: .*:wordy returned '1', expected a finite number",
        "constant": "is a int, expected a function of an output",
        "gone": "is nothing, expected a function of an output",
    }.items():
        with pytest.raises(EvaluatorError, match=message):
            build(f"generate:{path},check={module}:{name}")
    with pytest.raises(UsageError, match="check: `shorter` is not module:function"):
        build(f"generate:{path},check=shorter")
    with pytest.raises(UsageError, match="both check= and regex="):
        build(f"generate:{path},check={module}:polite,regex=x")
    evaluator = build(f"generate:{path},check={module}:late")
    with pytest.raises(EvaluatorError, match=r"a\.jsonl:2: .*:late failed: AssertionError"):
        evaluator(ToyEngine(says=lambda _: "x"))


def test_identity_follows_data_options_and_the_checkers_source(tmp_path: Path, module: str) -> None:
    path = write(tmp_path / "a.jsonl", [{**ROWS[0], "most": 3}])
    options = [
        "",
        ",chat=true",
        ",max_new_tokens=9",
        ",regex=a",
        f",check={module}:polite",
        f",check={module}:shorter",
    ]
    found = [build(f"generate:{path}{more}").identity for more in options]
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("# another reading\n")
    found.append(build(f"generate:{path},check={module}:polite").identity)
    found.append(build(f"generate:{write(path, ROWS)}").identity)
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)


def test_prompts_are_encoded_once_and_limited_by_the_seed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"prompt": f"p{number}", "answer": "x"} for number in range(40)]
    )
    evaluator = build(f"generate:{path}", limit=5, seed=1)
    engine = ToyEngine(tokenizer=Characters(bos=False))
    first = evaluator(engine)
    calls = engine.tokenizer.calls
    assert evaluator(engine) == first
    assert engine.tokenizer.calls == calls
    assert engine.prompted[0] is engine.prompted[1]
    ids = [item.id for item in first.items]
    assert ids == sorted(ids, key=int) and len(set(ids)) == 5
    assert [f"p{int(id) - 1}" for id in ids] == [
        engine.tokenizer.decode(prompt) for prompt in engine.prompted[0]
    ]
    assert [
        item.id for item in build(f"generate:{path}", limit=5, seed=2)(ToyEngine()).items
    ] != ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, r"expected either `prompt` or `messages`"),
        (
            {"prompt": "x", "messages": MESSAGES, "answer": "x"},
            r"expected either `prompt` or `messages`",
        ),
        ({"promt": "x", "answer": "x"}, "there is no field `promt`"),
        ({"prompt": "x", "answr": "x"}, "there is no field `answr`"),
        ({"prompt": 5, "answer": "x"}, "`prompt` is 5, expected a text"),
        ({"prompt": " ", "answer": "x"}, "`prompt` is ' ', expected a text"),
        ({"messages": [], "answer": "x"}, r"`messages` is \[\], expected a list of messages"),
        ({"messages": ["Hi"], "answer": "x"}, r"`messages` is \['Hi'\]"),
        ({"messages": [{"role": "user"}], "answer": "x"}, "expected a list of messages"),
        (
            {"messages": [{"role": "user", "content": None}], "answer": "x"},
            "expected a list of messages",
        ),
        ({"prompt": "x", "regex": "(a"}, r"`\(a` is not a regular expression: missing \)"),
        ({"prompt": "x", "regex": "a{" + "9" * 30 + "}"}, "is not a regular expression"),
        ({"prompt": "x", "regex": "(" * 20_000}, "is not a regular expression"),
        ({"prompt": "x", "regex": 5}, "`regex` is 5, expected a text"),
        ({"prompt": "x", "answer": 4}, "answer 4 is not a text"),
        ({"prompt": "x", "answer": []}, r"answer \[\] is not a text"),
        ({"prompt": "x", "answer": "x", "id": None}, "`id` is None"),
        ({"prompt": "x", "answer": "x", "group": []}, r"`group` is \[\]"),
        ({"prompt": "x", "answer": "x", "id": "1"}, r"id `1` was already used at .*:1"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [{"prompt": "x", "answer": "x"}, row])
    with pytest.raises(EvaluatorError, match=rf"bad\.jsonl:2: .*{message}") as caught:
        build(f"generate:{path},chat=true")
    assert caught.value.hint


def test_messages_need_the_template(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES, "answer": "x"}])
    with pytest.raises(EvaluatorError, match=r"a\.jsonl:1: `messages` need the chat template"):
        build(f"generate:{path}")


def test_a_bad_regex_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluatorError, match=r"`\[` is not a regular expression"):
        build(f"generate:{write(tmp_path / 'a.jsonl', ROWS[:1])},regex=[")


def test_an_engine_that_drops_an_output_is_caught(tmp_path: Path) -> None:
    engine = ToyEngine()
    engine.generate = lambda prompts, config: []  # type: ignore[method-assign]
    with pytest.raises(EvaluatorError, match="wrote 0 outputs, expected 2"):
        build(f"generate:{write(tmp_path / 'a.jsonl', ROWS)}")(engine)


FIELDS = st.sampled_from(["prompt", "messages", "answer", "regex", "id", "group"])
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-1, 3)
    | st.sampled_from(["a", "", "("])
    | st.lists(st.sampled_from(["a", ""]))
)


@given(st.lists(st.dictionaries(FIELDS, VALUES, max_size=5), min_size=1, max_size=4), st.booleans())
def test_any_rows_are_scored_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], chat: bool
) -> None:
    path = write(tmp_path_factory.mktemp("generate") / "a.jsonl", rows)
    try:
        evaluator = build(f"generate:{path},chat={str(chat).lower()}")
    except EvaluatorError as error:
        assert error.hint
        return
    assert 0 <= evaluator(ToyEngine(tokenizer=Chatting(), says=lambda prompt: prompt)).value <= 1


@pytest.mark.parametrize(
    "options",
    ["generate:{}", "icl:{},shots=0", "icl:{},shots=0,mode=generate", "alpaca:{},chat=false"],
)
def test_a_prompt_that_was_rendered_beforehand_gets_no_second_bos(
    tmp_path: Path, options: str
) -> None:
    asked = []
    for prompt in ("\x01<user>Hi<assistant>", "<user>Hi<assistant>"):
        row = {"prompt": prompt, "choices": ["x", "y"], "answer": "x", "instruction": prompt}
        engine = ToyEngine(tokenizer=Characters(bos=True))
        build(options.format(write(tmp_path / "a.jsonl", [row])))(engine)
        asked.append((engine.asked, engine.prompted))
    assert asked[0] == asked[1]


def test_a_message_that_brings_bos_to_a_template_that_writes_it_makes_no_second_one(
    tmp_path: Path,
) -> None:
    class Bare(Chatting):
        def apply_chat_template(
            self, messages: Any, tokenize: bool, add_generation_prompt: bool
        ) -> str:
            return "\x01" + "".join(message["content"] for message in messages)

    engine = ToyEngine(tokenizer=Bare())
    file = write(tmp_path / "a.jsonl", [{"prompt": chr(1) + "Hi", "answer": "x"}])
    build(f"generate:{file},chat=true")(engine)
    assert engine.prompted == [[[1, ord("H"), ord("i")]]]

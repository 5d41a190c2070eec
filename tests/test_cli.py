"""The command line as people and programs meet it: output, exit codes, interruption, resumption."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from pa_fast import cli
from pa_fast.errors import PaFastError
from tests import patience, programs
from tests.engines.architectures import write_model, write_pair

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = ROOT / "examples" / "demo" / "pair" / "instruct"

EVALUATOR = """
import json, os, pathlib, time
from pa_fast import Item, Score

def greedy(engine):
    with open(os.environ["CALLS"], "a") as log:
        log.write(f"{engine.weights.lam!r}\\n")
    time.sleep(float(os.environ.get("PAUSE", "0")))
    scores = [engine.loglikelihood([([3, 4, k], [5, 6])])[0].logprob for k in range(3, 9)]
    items = [Item(str(k), "all", s) for k, s in enumerate(scores)]
    return Score(sum(scores) / len(scores), "nats", len(scores), items)

def refuses(engine):
    from pa_fast.errors import EvaluatorError
    raise EvaluatorError("the line 3 is bad", "mend line 3")

def broken(engine):
    raise RuntimeError("no such luck")

def names_its_own_λ(engine):
    raise RuntimeError(f"no luck at {engine.weights.lam}")

def replaces(engine):
    import torch
    head = engine.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.data * 2, requires_grad=False)
    return Score(1.0, "none", 1)

def after(engine):
    return Score(engine.loglikelihood([([3, 4], [5])])[0].logprob, "nats", 1)

def vandal(engine):
    import torch
    with torch.no_grad():
        next(engine.model.parameters())[0, 0] += 1
    return Score(1.0, "none", 1)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base, instruct = write_pair(tmp_path_factory.mktemp("pair"), "llama")
    for folder in (base, instruct):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, folder)
    return str(base), str(instruct)


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A working folder with a user's own evaluator module and a small text."""
    (tmp_path / "mine.py").write_text(EVALUATOR)
    (tmp_path / "notes.txt").write_text("abcd efgh\n" * 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pa-fast", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def start(*arguments: str, pause: float = 0.0) -> programs.Program:
    return programs.pa_fast(
        *arguments, folder=pathlib.Path.cwd(), environment={"PAUSE": str(pause)}
    )


def sweep(pair: tuple[str, str], out: str, *more: str) -> list[str]:
    return [
        "sweep",
        *pair,
        "--lambdas",
        "0:1:0.25",
        "--eval",
        "python:mine:greedy",
        "--out",
        out,
        "--no-report",
        *more,
    ]


def test_a_sweep_writes_what_it_promises_and_does_nothing_twice(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--eval", "perplexity:notes.txt,window=32", "--limit", "3"]
    assert run(monkeypatch, *sweep(pair, "runs/a", *more)) == 0
    shown = capsys.readouterr()
    assert "python:greedy" in shown.out and "0.25" in shown.out
    assert "results and figure: runs/a" in shown.err
    names = {
        "run.json",
        "journal.jsonl",
        "items",
        "results.csv",
        "results.json",
        "trajectory.svg",
        "trajectory.png",
        "trajectory.pdf",
    }
    assert names <= {path.name for path in (place / "runs/a").iterdir()}
    rows = (place / "runs/a/results.csv").read_text().splitlines()
    assert rows[0] == "lambda,evaluator,score,unit,n,effective_lambda,lambda_value"
    assert [row.split(",")[0] for row in rows[1:]] == [
        "0",
        "0",
        "0.25",
        "0.25",
        "0.5",
        "0.5",
        "0.75",
        "0.75",
        "1",
        "1",
    ]
    run_file = json.loads((place / "runs/a/run.json").read_text())
    assert "tokenizer" in json.dumps(run_file) and "chat_template" in json.dumps(run_file)

    before = (
        (place / "runs/a/journal.jsonl").read_bytes(),
        (place / "runs/a/results.csv").read_bytes(),
    )
    assert run(monkeypatch, *sweep(pair, "runs/a", *more)) == 0
    assert (
        (place / "runs/a/journal.jsonl").read_bytes(),
        (place / "runs/a/results.csv").read_bytes(),
    ) == before
    assert len((place / "calls").read_text().splitlines()) == 5

    capsys.readouterr()
    assert run(monkeypatch, *sweep(pair, "runs/a", *more, "--batch-size", "2")) == 1
    assert "batch_size" in capsys.readouterr().err
    assert run(monkeypatch, "report", "runs/a") == 0
    assert "python:greedy" in capsys.readouterr().out


def test_a_sweep_prints_what_loading_found(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (folder, rows) in enumerate((("base", 128), ("instruct", 133))):
        write_model(place / folder, "llama", seed, vocab_size=rows)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, place / folder)
    assert run(monkeypatch, *sweep(("base", "instruct"), "runs/a", "--lambdas", "0.5")) == 0
    shown = capsys.readouterr()
    assert "note: rows 128 to 132 of `" in shown.err and "note" not in shown.out


@pytest.mark.draws
def test_the_same_sweep_in_two_places_gives_equal_files(
    pair: tuple[str, str], place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("runs/a", "runs/b"):
        assert run(monkeypatch, *sweep(pair, out)) == 0
    for name in ("results.csv", "results.json", "trajectory.svg", "trajectory.png"):
        assert (place / "runs/a" / name).read_bytes() == (place / "runs/b" / name).read_bytes(), (
            name
        )


def test_failed_points_end_with_exit_code_1_and_their_reason(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = sweep(
        pair,
        "runs/a",
        "--eval",
        "python:mine:broken",
        "--eval",
        "python:mine:vandal",
        "--lambdas",
        "0.5",
    )
    assert run(monkeypatch, *arguments) == 1
    shown = capsys.readouterr().err
    assert "no such luck" in shown
    assert "python:vandal" in shown and "model.embed_tokens.weight" in shown
    assert "2 of 3 points failed" in shown
    assert "Traceback" not in shown
    assert shown.count("tracebacks are in runs/a/journal.jsonl, key `traceback`; --debug") == 1
    assert "python:greedy" in (place / "runs/a/results.csv").read_text()
    with pytest.raises(PaFastError, match="2 of 3 points failed"):
        run(monkeypatch, *arguments, "--debug")
    shown = capsys.readouterr().err
    assert shown.count("Traceback (most recent call last)") == 1
    assert 'mine.py", line' in shown and "in broken" in shown and "journal.jsonl" not in shown
    assert run(monkeypatch, *arguments, "--debug", "--log-format", "json") == 1
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (told,) = (one for one in events if one["event"] == "traceback")
    assert told["evaluator"] == "python:broken" and "in broken" in told["traceback"]


@pytest.mark.parametrize(
    ("evaluator", "lambdas", "alike"),
    [
        ("broken", "0.5", False),
        ("broken", "0,0.5", True),
        ("names_its_own_λ", "0.5", False),
        ("names_its_own_λ", "0,0.5,1", True),
    ],
)
def test_the_last_hint_of_failed_points_is_true(
    evaluator: str,
    lambdas: str,
    alike: bool,
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["sweep", *pair, "--out", "runs/a", "--no-report", "--lambdas", lambdas]
    assert run(monkeypatch, *arguments, "--eval", f"python:mine:{evaluator}") == 1
    hint = " ".join(capsys.readouterr().err.rpartition("hint: ")[2].split())
    assert "mend" in hint and "what the message names" in hint and "again" in hint
    assert ("they fail alike at every λ" in hint) is alike
    assert ("tries the failed points once more" in hint) is not alike


def test_a_wrong_instruct_beside_a_delta_costs_no_point(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = ["encode", *pair, "--format", "lowrank", "--rank", "1", "--out", "d.lr"]
    assert run(monkeypatch, *encode) == 0
    assert "lowrank, rank 1, seed 0" in capsys.readouterr().out
    base, instruct = pair
    assert run(monkeypatch, *sweep((base, base), "runs/a", "--delta", "d.lr")) == 1
    assert "was encoded from an instruct model of quick fingerprint" in capsys.readouterr().err
    assert not (place / "runs").exists() and not (place / "calls").exists()
    assert run(monkeypatch, *sweep((base, instruct), "runs/a", "--delta", "d.lr")) == 0


def test_the_hint_of_a_failed_point_stands_below_it_once(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "sweep",
        *pair,
        "--out",
        "runs/a",
        "--eval",
        "python:mine:refuses",
        "--lambdas",
        "0,1",
    ]
    assert run(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err.splitlines()
    told = "failed: python:refuses at λ = {}: the line 3 is bad"
    at = said.index(told.format(0))
    assert said[at : at + 3] == [told.format(0), "  hint: mend line 3", told.format(1)]


def test_an_evaluator_that_moves_parameters_spoils_nothing_silently(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--eval", "python:mine:replaces", "--eval", "python:mine:after", "--lambdas", "0.5"]
    arguments = ["sweep", *pair, "--out", "runs/a", *more]
    assert run(monkeypatch, *arguments) == 1
    shown = capsys.readouterr().err
    assert "evaluator `python:replaces` changed the model" in shown and "lm_head.weight" in shown
    assert (place / "runs/a/results.csv").read_text().count("\n") == 1, (
        "nothing measured on another model is recorded"
    )


def test_an_fp32_sweep_works(
    pair: tuple[str, str], place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, *sweep(pair, "runs/a", "--dtype", "float32")) == 0


def test_a_terminal_without_lambda_gets_a_question_mark(pair: tuple[str, str]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "pa_fast", "inspect", *pair],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr


KILLS = int(os.environ.get("PA_FAST_KILLS", "1"))


@pytest.mark.draws
def test_sigkill_at_random_moments_changes_nothing(
    pair: tuple[str, str], place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, *sweep(pair, "runs/quiet")) == 0
    (place / "calls").unlink()
    draw = random.Random(5)
    for _ in range(KILLS):
        process = start(*sweep(pair, "runs/killed"), pause=0.4)
        watch = patience.Watch(process.pid)
        calls = len((place / "calls").read_text().splitlines()) if (place / "calls").exists() else 0
        while process.poll() is None and watch.stalled() is None:
            if (place / "calls").exists() and len(
                (place / "calls").read_text().splitlines()
            ) > calls:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.0))
        process.kill()
        process.communicate()
    assert run(monkeypatch, *sweep(pair, "runs/killed")) == 0
    for name in ("results.csv", "results.json", "trajectory.svg"):
        assert (place / "runs/killed" / name).read_bytes() == (
            place / "runs/quiet" / name
        ).read_bytes(), name
    finished = [
        json.loads(line)
        for line in (place / "runs/killed/journal.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    keys = [(entry["lambda"], entry["evaluator"]) for entry in finished]
    assert len(keys) == len(set(keys)) == 5
    assert len((place / "calls").read_text().splitlines()) <= 5 + KILLS, (
        "a kill may lose the running point, never a finished one"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupt_prints_the_command_that_goes_on(
    pair: tuple[str, str], place: pathlib.Path, number: signal.Signals
) -> None:
    process = start(*sweep(pair, "runs/a"), pause=30)
    watch = patience.Watch(process.pid)
    while not (place / "calls").exists() and process.poll() is None and watch.stalled() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, shown = patience.communicate(process)
    assert process.returncode == 130, shown
    assert "Go on with:" in shown and "pa-fast sweep" in shown and "--out runs/a" in shown
    assert "Traceback" not in shown


def test_an_interrupted_merge_goes_on(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextlib.contextmanager
    def interrupting(what: str) -> Iterator[Callable[[int, int], None]]:
        def stop(done: int, total: int) -> None:
            if done == total:
                raise KeyboardInterrupt

        yield stop

    command = ("merge", *pair, "--lambda", "0.5", "--out", "merged", "--max-shard-size", "20kB")
    with monkeypatch.context() as patched:
        patched.setattr("pa_fast.cli.merges.byte_bar", interrupting)
        assert run(monkeypatch, *command) == 130
    assert "Go on with:" in (shown := capsys.readouterr().err) and "--out merged" in shown
    assert run(monkeypatch, *command) == 0
    assert "were complete from an unfinished run" in capsys.readouterr().err
    assert run(monkeypatch, "verify", "merged", *pair) == 0


def test_merge_verify_and_what_a_flipped_bit_does(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "merge", *pair, "--lambda", "1/3", "--out", "merged") == 0
    assert "λ = 1/3" in capsys.readouterr().out
    assert run(monkeypatch, "verify", "merged", *pair) == 0
    assert "every bit" in capsys.readouterr().out
    assert run(monkeypatch, "verify", "merged", *pair, "--lambda", "0.4", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is False and "is not the merge at λ = 0.4" in shown.err
    file = next(iter((place / "merged").glob("*.safetensors")))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1).view(torch.int16)[0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    assert run(monkeypatch, "verify", "merged", *pair) == 1
    shown = capsys.readouterr()
    assert f"`{name}`: bits differ (1 of" in shown.err and shown.out == ""
    assert run(monkeypatch, "merge", *pair, "--lambda", "0.5", "--out", "merged") == 1
    assert "not empty" in capsys.readouterr().err
    assert (
        run(
            monkeypatch,
            "merge",
            *pair,
            "--lambda",
            "-0.2",
            "--out",
            "merged",
            "--overwrite",
            "--json",
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["lam"] == "-0.2"


def test_inspect_answers_people_and_programs_without_torch(pair: tuple[str, str]) -> None:
    code = (
        "import sys, pa_fast.cli as cli; sys.argv[1:] = ['inspect', *sys.argv[1:], '--json']\n"
        "try: cli.main()\n"
        "finally: assert 'torch' not in sys.modules, 'inspect imported torch'"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code, *pair],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "llama"


def test_inspect_prints_a_table(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", *pair) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown and "BF16" in shown and pair[0] in shown
    assert "weights not read: --sample or --full" in shown
    assert run(monkeypatch, "inspect", *pair, "--sample") == 0
    assert "weights not read" not in capsys.readouterr().out


@pytest.mark.parametrize("sides", ["unrelated", "trained"])
def test_a_delta_file_that_is_larger_than_a_dense_one_is_said_to_be(
    sides: str,
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = pair if sides == "unrelated" else (str(TOKENIZER.parent / "base"), str(TOKENIZER))
    sizes, noted = {}, {}
    for format in ("dense", "packed", "sparse"):
        assert run(monkeypatch, "encode", *both, "--format", format, "--out", format) == 0
        noted[format] = "note: --format dense would be smaller" in capsys.readouterr().err
        sizes[format] = sum(tensor.nbytes for tensor in load_file(place / format).values())
    assert noted == {format: size > sizes["dense"] for format, size in sizes.items()}
    # of unrelated sides packed keeps every tensor in full, which takes what dense takes
    assert noted["packed"] is (sides == "trained")


def test_a_lambda_far_from_both_sides_is_noted(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for lam, far in (("60", True), ("-4.5", True), ("4", False), ("-0.2", False)):
        assert run(monkeypatch, "merge", *pair, "--lambda", lam, "--out", f"m{lam}") == 0
        assert (f"note: λ = {lam} is far outside [0, 1]" in capsys.readouterr().err) is far


def test_a_tokenizer_that_a_delta_leaves_to_base_is_noted(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "encode", *pair, "--format", "sparse", "--out", "delta") == 0
    for more, noted in ([], True), (["--tokenizer", pair[1]], False):
        arguments = ["--delta", "delta", "--lambdas", "0", "--eval", "python:mine:after"]
        arguments += ["--out", f"run{len(more)}", *more]
        assert run(monkeypatch, "sweep", pair[0], *arguments) == 0
        assert ("the tokenizer at every λ is base's" in capsys.readouterr().err) is noted


def test_rule_and_rounding_go_from_the_sweep_to_the_merge(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "rule.yaml").write_text(
        "- {group: norms, lambda: 1}\n- {group: mlp, times: {0: 0.5, 1: 1}}\n"
    )
    how = ["--rule", "rule.yaml", "--rounding", "stochastic", "--seed", "3"]
    assert run(monkeypatch, *sweep(pair, "run", *how)) == 0
    engine = json.loads((place / "run" / "run.json").read_text())["engine"]
    assert engine["rounding"] == "stochastic, seed 3" and engine["rule"][0] == {
        "group": "norms",
        "lambda": "1",
    }
    rows = json.loads((place / "run" / "results.json").read_text())["rows"]
    journal = [
        json.loads(line) for line in (place / "run" / "journal.jsonl").read_text().splitlines()
    ]
    for row, line in zip(rows, journal):
        assert abs(row["effective_lambda"] - row["intended_lambda"]) < 0.01
        assert line["intended_lambda"] == pytest.approx(row["intended_lambda"], rel=1e-5)
    assert (
        (place / "run" / "results.csv")
        .read_text()
        .startswith("lambda,evaluator,score,unit,n,effective_lambda,lambda_value\n")
    )
    capsys.readouterr()
    for change, said in (
        (["--seed", "4"], "stochastic, seed 4"),
        (["--rounding", "nearest"], "nearest"),
    ):
        assert run(monkeypatch, *sweep(pair, "run", *how, *change)) == 1
        assert (
            f'engine.rounding: recorded "stochastic, seed 3", now "{said}'
            in capsys.readouterr().err
        )
    (place / "rule.yaml").write_text("- {group: norms, lambda: 1}\n- {group: mlp, times: 0.5}\n")
    assert run(monkeypatch, *sweep(pair, "run", *how)) == 1
    assert "engine.rule: recorded [" in capsys.readouterr().err
    assert run(monkeypatch, "merge", *pair, "--lambda", "0.5", "--out", "merged", *how) == 0
    assert "note: rule (group: norms" in capsys.readouterr().err
    assert run(monkeypatch, "verify", "merged", *pair) == 0
    named = "the merge at λ = 0.5, rounding stochastic, seed {}, under the rule (group: norms"
    assert named.format(3) in capsys.readouterr().out
    assert run(monkeypatch, "verify", "merged", *pair, "--seed", "4") == 1
    assert f"is not {named.format(4)}" in capsys.readouterr().err
    (place / "rule.yaml").write_text("- {group: norms, lambda: 1, layer: 3}\n")
    assert run(monkeypatch, "merge", *pair, "--lambda", "0.5", "--out", "o", *how) == 2
    assert "rule.yaml: row 1: unknown key `layer`" in capsys.readouterr().err


WRONG_USAGE = {
    "unknown option": (["sweep", "a", "b", "--frobnicate"], "No such option"),
    "unknown verb": (["frobnicate"], "No such command"),
    "missing option": (["merge", "a", "b"], "Missing option"),
    "step that does not divide": (
        ["sweep", "a", "b", "--lambdas", "0:1:0.3", "--eval", "python:m:f", "--out", "o"],
        "does not divide",
    ),
    "no lambda": (
        ["merge", "a", "b", "--lambda", "lots", "--out", "o"],
        "`lots` is not a finite number",
    ),
    "unknown evaluator": (
        ["sweep", "a", "b", "--lambdas", "0", "--eval", "bleu:x", "--out", "o"],
        "no evaluator `bleu`",
    ),
    "unknown dtype": (
        ["merge", "a", "b", "--lambda", "0", "--out", "o", "--dtype", "int4"],
        "int4",
    ),
    "unknown rounding": (
        ["merge", "a", "b", "--lambda", "0", "--out", "o", "--rounding", "up"],
        "rounding `up`",
    ),
    "a seed of nothing": (
        ["merge", "a", "b", "--lambda", "0", "--out", "o", "--seed", "3"],
        "seed 3 with rounding `nearest`",
    ),
    "no rule": (
        ["merge", "a", "b", "--lambda", "0", "--out", "o", "--rule", "none.yaml"],
        "none.yaml: the rule cannot be read",
    ),
    "no rule of a sweep": (
        [
            "sweep",
            "a",
            "b",
            "--lambdas",
            "0",
            "--eval",
            "python:mine:greedy",
            "--out",
            "o",
            "--rule",
            "none.yaml",
        ],
        "none.yaml: the rule cannot be read",
    ),
    "no output": (
        ["merge", "a", "b", "--lambda", "0", "--out", ""],
        "out: found '', expected a path\n\nhint: name a file or folder",
    ),
    "λ beyond fp32": (
        ["merge", "a", "b", "--lambda", "1e400", "--out", "o"],
        "λ `1e400` does not fit in fp32",
    ),
    "no range": (
        ["encode", "a", "b", "--format", "packed", "--range", "1", "--out", "o"],
        "--range 1, expected LO:HI",
    ),
    "no size": (
        ["merge", "a", "b", "--lambda", "0", "--out", "o", "--max-shard-size", "big"],
        "`big` is not a size",
    ),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_is_exit_code_2(
    case: str,
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = WRONG_USAGE[case]
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == "" and "Traceback" not in shown.err
    assert not (place / "o").exists()


@pytest.mark.parametrize("verb", ["sweep", "merge", "inspect", "verify", "report"])
def test_failures_are_one_message_and_a_hint(
    verb: str,
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {
        "sweep": [
            "sweep",
            "nowhere",
            "nowhere",
            "--lambdas",
            "0",
            "--eval",
            "perplexity:notes.txt",
            "--out",
            "o",
        ],
        "merge": ["merge", "nowhere", "nowhere", "--lambda", "0", "--out", "o"],
        "inspect": ["inspect", "nowhere", "nowhere"],
        "verify": ["verify", "nowhere", "nowhere", "nowhere"],
        "report": ["report", "nowhere"],
    }[verb]
    assert run(monkeypatch, *arguments) == 1
    shown = capsys.readouterr().err
    assert (
        shown.startswith("error: ")
        and "nowhere" in shown
        and "\n\nhint: " in shown
        and "Traceback" not in shown
    )
    assert not (place / "o").exists()


def test_a_bug_is_one_line_and_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("pa_fast.checkpoint.inspect.inspect", bug)
    assert run(monkeypatch, "inspect", "a", "b") == 1
    assert "unexpected ZeroDivisionError: boom" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["pa-fast", "inspect", "a", "b", "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("verb", ["", "sweep", "merge", "verify", "inspect", "report"])
def test_help_exists(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *filter(None, [verb, "--help"])) == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown
    if not verb:
        assert "--debug" in shown


def test_the_answer_comes_first_and_the_chosen_λ_is_merged(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = sweep(pair, "o")
    arguments[arguments.index("--lambdas") + 1] = "auto"
    assert run(monkeypatch, *arguments, "--objective", "python", "--budget", "7") == 0
    said = capsys.readouterr()
    document = json.loads((place / "o" / "results.json").read_text())
    sentence = document["answer"]["sentence"]
    assert " ".join(said.out.split()).startswith(sentence) and "no λ is added: " in said.err
    assert run(monkeypatch, "merge", "--best-of", "o", "--out", "best") == 0
    said = capsys.readouterr()
    assert sentence in " ".join(said.err.split())
    merged = json.loads((place / "best" / "pa_fast.json").read_text())
    assert merged["lambda"] == document["answer"]["lambda"]
    for wrong, hint in (
        (["--lambda", "0.5"], "--lambda beside --best-of"),
        (["--dtype", "float32"], "--dtype beside --best-of"),
        (["--rounding", "stochastic"], "--rounding beside --best-of"),
        (["--objective", "x"], "no evaluator is called `x`"),
    ):
        assert run(monkeypatch, "merge", "--best-of", "o", "--out", "other", *wrong) == 2
        assert hint in capsys.readouterr().err
    assert run(monkeypatch, "merge", *pair, "--out", "other") == 2
    assert "needs BASE, INSTRUCT and --lambda" in capsys.readouterr().err
    assert run(monkeypatch, "merge", *pair, "--lambda", "1", "--keep", "x>=1", "--out", "z") == 2
    assert "--best-of RUN" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--workers", "2"]])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lambdas", "0,0.5", "--keep", "perplexity>=98%"], "this sweep does not evaluate λ = 1"),
        (["--keep", "python>=98%"], "is the objective itself"),
        (["--keep", "python>98%"], "is not NAME>=SHARE"),
        (["--report-every", "2"], "--report-every 2 and --no-report together"),
    ],
)
def test_questions_that_cannot_be_answered_load_no_model(
    more: list[str],
    message: str,
    way: list[str],
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pa_fast.run.engine", lambda job: pytest.fail("a model was loaded"))
    monkeypatch.setattr("pa_fast.launch.ray.sweep", lambda *_, **__: pytest.fail("Ray was started"))
    other = ["--eval", "perplexity:notes.txt,window=32"]
    assert run(monkeypatch, *sweep(pair, "o", *other, *more, *way)) == 2
    assert message in capsys.readouterr().err
    assert not (place / "o").exists()


def test_a_text_of_one_document_is_no_objective_of_auto(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["sweep", *pair, "--lambdas", "auto", "--out", "o", "--no-report"]
    text = "perplexity:notes.txt,window=32"
    assert run(monkeypatch, *arguments, "--eval", text) == 1
    shown = capsys.readouterr().err
    assert f"`{text.replace('.txt', '')}`: the score has 1 item" in shown
    assert "split=blank" in shown.partition("hint: ")[2] and not (place / "o").exists()
    (place / "notes.txt").write_text("\n\n".join(f"abcd efgh {k}" for k in range(5)))
    assert run(monkeypatch, *arguments, "--eval", f"{text},split=blank") == 0


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_of_a_json_log_is_an_object(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = ["--log-format", "json"]
    assert run(monkeypatch, *sweep(pair, "o", *said)) == 0
    shown = capsys.readouterr()
    [answer], events = lines(shown.out), lines(shown.err)
    recorded = json.loads((place / "o" / "results.json").read_text())["answer"]
    assert answer["event"] == "answer" and answer.items() >= recorded.items()
    assert events[-1]["event"] == "results" and events[-1]["folder"] == "o"
    more = ["--eval", "python:mine:broken", "--eval", "python:mine:replaces"]
    assert run(monkeypatch, *sweep(pair, "failing", *more, *said)) == 1
    shown = capsys.readouterr()
    last = lines(shown.out + shown.err)[-1]
    assert last["event"] == "error" and "points failed" in str(last["message"]) and last["hint"]
    assert run(monkeypatch, *sweep(pair, "o", *said, "--lambdas", "up")) == 2
    [last] = lines(capsys.readouterr().err)
    assert last["event"] == "error" and "`up` is not a number" in str(last["message"])


def test_an_interrupt_is_an_object_of_a_json_log(
    pair: tuple[str, str], place: pathlib.Path
) -> None:
    process = start(*sweep(pair, "runs/a", "--log-format", "json"), pause=30)
    watch = patience.Watch(process.pid)
    while not (place / "calls").exists() and process.poll() is None and watch.stalled() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, shown = patience.communicate(process)
    assert process.returncode == 130 and out == ""
    last = lines(shown)[-1]
    assert last["event"] == "interrupted" and "--out runs/a" in str(last["command"])


def test_a_page_of_an_earlier_sweep_is_not_named(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *sweep(pair, "o", "--report")) == 0
    assert "results and figure, page report.html: o" in capsys.readouterr().err
    assert run(monkeypatch, *sweep(pair, "o", "--lambdas", "0.3")) == 0
    assert "results and figure: o\n" in capsys.readouterr().err


def test_another_question_is_answered_by_report_and_recorded_by_a_merge(
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "notes.txt").write_text("\n\n".join(f"abcd efgh {k}" for k in range(9)))
    other = ["--eval", "perplexity:notes.txt,window=32,split=blank"]
    assert run(monkeypatch, *sweep(pair, "o", *other)) == 0
    name = "perplexity:notes,window=32,split=blank"
    asked = ["--objective", "perp", "--keep", "python>=50%"]
    capsys.readouterr()
    assert run(monkeypatch, "report", "o", *asked) == 0
    shown = " ".join(capsys.readouterr().out.split())
    answer = json.loads((place / "o" / "results.json").read_text())["answer"]
    assert shown.startswith(answer["sentence"])
    assert answer["objective"] == name and answer["keep"] == {"python:greedy": 0.5}
    assert json.loads((place / "o" / "statistics.json").read_text())["answer"] == answer
    assert run(monkeypatch, "report", "o") == 0
    own = json.loads((place / "o" / "results.json").read_text())["answer"]
    assert own["objective"] == "python:greedy" and "keep" not in own
    before = (place / "o" / "results.json").read_bytes()
    for wrong, message in (
        (["--objective", "x"], "no evaluator is called `x`"),
        (["--keep", "python>=50%"], "is the objective itself"),
        (["--keep", "perp>50%"], "is not NAME>=SHARE"),
    ):
        assert run(monkeypatch, "report", "o", *wrong) == 2
        assert message in capsys.readouterr().err
    assert (place / "o" / "results.json").read_bytes() == before

    for way, out in (([], "merged"), (["--from-model"], "live")):
        assert run(monkeypatch, "merge", "--best-of", "o", *asked, "--out", out, *way) == 0
        record = json.loads((place / out / "pa_fast.json").read_text())["chosen_from"]
        assert record == {
            "run": "o",
            "objective": name,
            "keep": {"python:greedy": 0.5},
            "answer": answer["sentence"],
        }
        card = (place / out / "README.md").read_text()
        assert f"    objective  {name}\n    keep       python:greedy ≥ 50 %\n" in card
        assert run(monkeypatch, "verify", out, *pair) == 0
    assert run(monkeypatch, "merge", *pair, "--lambda", "0.5", "--out", "plain") == 0
    assert "chosen_from" not in (place / "plain" / "pa_fast.json").read_text()


@pytest.mark.parametrize("way", ["one process", "ray", "lockstep"])
def test_a_bad_run_folder_is_found_before_a_model_is_loaded(
    way: str,
    pair: tuple[str, str],
    place: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "o").mkdir()
    (place / "o" / "thesis.tex").touch()
    monkeypatch.setattr("pa_fast.run.engine", lambda job: pytest.fail("a model was loaded"))
    more = {
        "one process": [],
        "ray": ["--workers", "2"],
        "lockstep": ["--engine", "tensor-parallel"],
    }[way]
    assert run(monkeypatch, *sweep(pair, "o", *more)) == 1
    assert "holds `thesis.tex` and no run.json" in capsys.readouterr().err
    assert [path.name for path in (place / "o").iterdir()] == ["thesis.tex"]
    assert not (place / "calls").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    from pa_fast.sweep import sweep as run_sweep
    from tests.sweep.fakes import FakeEngine, Scorer

    out = tmp_path_factory.mktemp("finished") / "run"
    run_sweep(FakeEngine(), "0:1:0.01", [Scorer("icl")], out, figure=False)
    return str(out)


@pytest.mark.parametrize(
    ("verb", "stdout", "said"),
    [
        ("inspect", "closed", "error: standard output is closed"),
        ("inspect", "nobody reads", "error: standard output was closed before all of it was read"),
        ("inspect", "full", "error: output: No space left on device"),
        ("report", "nobody reads", "error: standard output was closed before all of it was read"),
        pytest.param(
            *("report", "closed", "error: standard output is closed"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("report", "full", "error: output: No space left on device"), marks=pytest.mark.slow
        ),
    ],
)
def test_output_that_cannot_be_written_is_one_message(
    verb: str, stdout: str, said: str, finished_run: str, pair: tuple[str, str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    target = {"closed": ">&-", "nobody reads": f">&{writing}", "full": ">/dev/full"}[stdout]
    arguments = {"report": ["report", finished_run], "inspect": ["inspect", *pair, "--json"]}[verb]
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m pa_fast "$@" {target}', sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[writing],
        check=False,
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr.startswith(said) and done.stderr.count("\n\nhint: ") == 1, done.stderr
    assert (
        "Traceback" not in done.stderr
        and "Exception ignored" not in done.stderr
        and done.stderr.count("error:") == 1
    )

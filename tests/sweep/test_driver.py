"""The loop: proof of every switch, failures that stay where they belong, resume."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pa_fast.base import Engine, Item, Lambda, Score
from pa_fast.errors import EvaluatorError, RunError, UsageError
from pa_fast.sweep import journal, sweep
from pa_fast.sweep.driver import failing_alike
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.progress import Silent, TerminalProgress
from pa_fast.sweep.results import Failure, SweepResult
from tests.sweep.fakes import INSTRUCT, FakeEngine, Scorer


def run(engine: Any, points: Any, scorers: list[Any], out: Path, **options: Any) -> SweepResult:
    return sweep(engine, points, scorers, out, figure=False, **options)


def write_to_weights(engine: Engine) -> None:
    engine.weights.live["head.weight"][0] += 1.0  # type: ignore[attr-defined]


def test_every_point_is_evaluated_on_its_own_weights(tmp_path: Path) -> None:
    engine, first, second = FakeEngine(), Scorer("a"), Scorer("b", "nats", higher=False)
    result = run(engine, "0:1:0.25", [first, second], tmp_path)
    assert first.calls == second.calls == [0, 0.25, 0.5, 0.75, 1]
    assert engine.weights.switches == [0, 0.25, 0.5, 0.75, 1]
    assert [(row.lam.key, row.evaluator) for row in result.rows] == list(
        itertools.product(["0", "0.25", "0.5", "0.75", "1"], "ab")
    )
    assert not result.failures
    assert all(
        row.effective_lambda == float(f"{float(row.lam) + 1 / 3e4:.6g}") for row in result.rows
    )


def test_finished_points_cost_no_switch_and_added_ones_run(tmp_path: Path) -> None:
    run(FakeEngine(), "0,1", [Scorer("a")], tmp_path)
    engine, first, second = FakeEngine(), Scorer("a"), Scorer("b")
    result = run(engine, "0,1", [first], tmp_path)
    assert not engine.weights.switches and len(result.rows) == 2
    result = run(engine, "0,1,0.5", [first], tmp_path)
    assert engine.weights.switches == first.calls == [0.5]
    result = run(engine, "0,1", [second, first], tmp_path)
    assert first.calls == [0.5] and second.calls == [0, 1]
    assert len(result.rows) == 5 and result.evaluators == ("a", "b")


def test_overwrite_starts_afresh(tmp_path: Path) -> None:
    run(FakeEngine(), "0,1", [Scorer("a")], tmp_path)
    scorer = Scorer("a", identity={"data": "d1"})
    result = run(FakeEngine({"base": "other"}), "0.5", [scorer], tmp_path, overwrite=True)
    assert scorer.calls == [0.5]
    assert [row.lam.key for row in result.rows] == ["0.5"]
    assert len(list((tmp_path / "items").iterdir())) == 1


def test_an_evaluator_that_writes_to_the_weights_fails_by_name_and_the_next_sees_clean_weights(
    tmp_path: Path,
) -> None:
    engine = FakeEngine()
    seen = []
    clean = Scorer("clean", act=lambda e: seen.append(e.weights.live == e.weights.merged()))  # type: ignore[attr-defined]
    result = run(engine, "0,0.5", [Scorer("dirty", act=write_to_weights), clean], tmp_path)
    assert [(failure.lam.key, failure.evaluator) for failure in result.failures] == [
        ("0", "dirty"),
        ("0.5", "dirty"),
    ]
    assert result.failures[0].error == "evaluator `dirty` wrote to the live weights: head.weight"
    assert seen == [True, True]
    assert [row.evaluator for row in result.rows] == ["clean", "clean"]
    assert engine.weights.switches == [0, 0, 0.5, 0.5]


def test_weights_are_restored_after_the_last_evaluator_too(tmp_path: Path) -> None:
    engine = FakeEngine()
    run(engine, "0.5", [Scorer("dirty", act=write_to_weights)], tmp_path)
    assert engine.weights.live == engine.weights.merged()


def test_an_evaluator_that_moves_to_another_λ_fails_by_name(tmp_path: Path) -> None:
    result = run(
        FakeEngine(),
        "0.5",
        [Scorer("mover", act=lambda engine: engine.weights.set_lambda(0.9))],
        tmp_path,
    )
    assert (
        result.failures[0].error
        == "evaluator `mover` left the live weights at λ = 0.9, and found them at 0.5"
    )


def test_an_evaluator_that_writes_and_fails_is_told_for_both(tmp_path: Path) -> None:
    def act(engine: Engine) -> None:
        write_to_weights(engine)
        raise KeyError("gone")

    seen: list[bool] = []
    clean = Scorer("clean", act=lambda e: seen.append(e.weights.live == e.weights.merged()))  # type: ignore[attr-defined]
    result = run(FakeEngine(), "0.5", [Scorer("dirty", act=act), clean], tmp_path)
    assert (
        "wrote to the live weights: head.weight; it also failed: KeyError: 'gone'"
        in result.failures[0].error
    )
    assert seen == [True]


def test_weights_that_cannot_be_restored_fail_the_rest_of_their_λ(tmp_path: Path) -> None:
    engine = FakeEngine()

    def act(touched: Engine) -> None:
        write_to_weights(touched)
        engine.weights.failing.add(0.5)

    result = run(engine, "0.5,0.75", [Scorer("dirty", act=act), Scorer("b")], tmp_path)
    assert [(f.lam.key, f.evaluator, f.error) for f in result.failures][1] == (
        "0.5",
        "b",
        "RuntimeError: the device is gone",
    )
    assert [(row.lam.key, row.evaluator) for row in result.rows] == [("0.75", "b")]


def test_weights_that_come_back_different_fail_the_rest_of_their_λ(tmp_path: Path) -> None:
    engine = FakeEngine(instruct={name: list(values) for name, values in INSTRUCT.items()})

    def act(touched: Engine) -> None:
        write_to_weights(touched)
        engine.weights.instruct["head.weight"][1] += 1.0

    later = Scorer("b")
    result = run(engine, "0.5", [Scorer("dirty", act=act), later], tmp_path)
    assert not later.calls and len(result.failures) == 2
    assert "setting λ = 0.5 again did not restore the live weights" in result.failures[1].error


def test_weights_that_cannot_reach_a_λ_refuse_the_schedule_before_its_first_point(
    tmp_path: Path,
) -> None:
    engine, scorer = FakeEngine(), Scorer("a")

    def check_lambda(lam: float) -> None:
        if lam > 0.5:
            raise UsageError(f"λ = {float(lam)} is out of reach", "stay below")

    engine.weights.check_lambda = check_lambda  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"λ = 0\.75 is out of reach"):
        run(engine, "0:1:0.25", [scorer], tmp_path / "run")
    assert not scorer.calls and not engine.weights.switches and not (tmp_path / "run").exists()
    run(engine, "0,0.5", [scorer], tmp_path / "run")
    with pytest.raises(UsageError, match=r"λ = 1\.0 is out of reach"):
        run(engine, "0.25,1", [scorer], tmp_path / "run")
    assert scorer.calls == [0, 0.5], "λ that are added are looked at like the first ones"


@pytest.mark.parametrize("where", ["failing", "stale", "unproven"])
def test_no_proof_no_evaluation(tmp_path: Path, where: str) -> None:
    engine, scorer, other = FakeEngine(), Scorer("a"), Scorer("b")
    (engine.stale if where == "stale" else getattr(engine.weights, where)).add(0.5)
    result = run(engine, "0,0.5,1", [scorer, other], tmp_path)
    assert scorer.calls == other.calls == [0, 1]
    assert [(failure.lam.key, failure.evaluator) for failure in result.failures] == [
        ("0.5", "a"),
        ("0.5", "b"),
    ]
    expected = {
        "failing": "the device is gone",
        "stale": "could not be reset",
        "unproven": "λ = 0.5 differ from a fresh merge",
    }
    assert expected[where] in result.failures[0].error
    assert [entry.checksum for entry in journal.read(tmp_path) if not entry.finished] == [
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("score", "why"),
    [
        (None, "returned a NoneType instead of a pa_fast.Score"),
        (0.5, "returned a float"),
        (Score(float("nan"), "accuracy", 1), "scored nan"),
        (Score(float("-inf"), "nats", 1), "scored -inf"),
        (Score("high", "nats", 1), "two numbers are expected"),  # type: ignore[arg-type]
        (Score(0.5, "accuracy", 0), "n = 0 items"),
        (Score(0.5, "accuracy", 1.5), "n = 1.5 items"),  # type: ignore[arg-type]
        (Score(0.5, "two\nlines", 1), "a text of one line is expected"),
        (Score(0.5, "accuracy", 2, [Item("a", "g", 1.0)]), "gave n = 2 and 1 items"),
        (Score(0.5, "accuracy", 1, [Item("a", "g", float("nan"))]), "scored item `a` nan"),
        (
            Score(0.5, "accuracy", 2, [Item("a", "g", 1.0), Item("a", "g", 0.0)]),
            "two items of the same group and id",
        ),
    ],
)
def test_a_score_that_cannot_be_recorded_fails_its_point(
    tmp_path: Path, score: Any, why: str
) -> None:
    class Odd:
        name, higher_is_better = "odd", True

        def __call__(self, engine: Engine) -> Any:
            return score

    result = run(FakeEngine(), "0,1", [Odd(), Scorer("a")], tmp_path)
    assert [failure.lam.key for failure in result.failures] == ["0", "1"]
    assert why in result.failures[0].error
    assert len(result.rows) == 2


def test_a_failing_evaluator_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    broken = {0.5, 1.0}

    def act(engine: Engine) -> None:
        if engine.weights.lam in broken:
            raise ValueError("out of luck")

    scorer = Scorer("a", act=act)
    result = run(FakeEngine(), "0:1:0.5", [scorer], tmp_path)
    assert [(failure.lam.key, failure.error) for failure in result.failures] == [
        ("0.5", "ValueError: out of luck"),
        ("1", "ValueError: out of luck"),
    ]
    failed = [entry for entry in journal.read(tmp_path) if not entry.finished]
    assert all(
        "out of luck" in (entry.traceback or "") and entry.checksum is not None for entry in failed
    )
    broken.remove(0.5)
    scorer.calls.clear()
    result = run(FakeEngine(), "0:1:0.5", [scorer], tmp_path)
    assert scorer.calls == [0.5, 1]
    assert [failure.lam.key for failure in result.failures] == ["1"]
    broken.clear()
    assert not run(FakeEngine(), "0:1:0.5", [scorer], tmp_path).failures
    undisturbed = run(FakeEngine(), "0:1:0.5", [Scorer("a")], tmp_path / "other")
    assert (tmp_path / "results.csv").read_bytes() == (undisturbed.out / "results.csv").read_bytes()
    assert (tmp_path / "results.json").read_bytes() == (
        undisturbed.out / "results.json"
    ).read_bytes()


def test_an_interrupt_leaves_results_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def act(engine: Engine) -> None:
        if engine.weights.lam == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(FakeEngine(), "0:1:0.25", [Scorer("a", act=act)], tmp_path)
    assert (tmp_path / "results.csv").read_text().count("\n") == 3
    assert [entry.lam for entry in journal.read(tmp_path)] == ["0", "0.25"]
    scorer = Scorer("a")
    assert len(run(FakeEngine(), "0:1:0.25", [scorer], tmp_path).rows) == 5
    assert scorer.calls == [0.5, 0.75, 1]


def test_other_weights_under_the_same_identity_are_refused(tmp_path: Path) -> None:
    run(FakeEngine(), "0,0.5", [Scorer("a")], tmp_path)
    before = (tmp_path / "results.csv").read_bytes()
    changed = FakeEngine(instruct={"embed.weight": [2.0, 1.0, 3.5], "head.weight": [-2.0, 1.25]})
    scorer = Scorer("b")
    with pytest.raises(
        RunError,
        match=r"other weights at λ = 0\.5: recorded checksum [0-9a-f]{16}, now [0-9a-f]{16}",
    ):
        run(changed, "0.5", [scorer], tmp_path)
    assert not scorer.calls
    assert (tmp_path / "results.csv").read_bytes() == before


def test_another_identity_is_refused_before_any_switch(tmp_path: Path) -> None:
    run(FakeEngine(), "0", [Scorer("a")], tmp_path)
    engine = FakeEngine(
        {"base": "b9", "instruct": "i0", "options": {"dtype": "bf16", "stop": [1, 2]}}
    )
    with pytest.raises(RunError, match=r'engine\.base: recorded "b0", now "b9"'):
        run(engine, "0,1", [Scorer("a")], tmp_path)
    assert not engine.weights.switches


def test_a_sweep_within_a_sweep_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    def act(engine: Engine) -> None:
        run(FakeEngine(), "0", [Scorer("a")], tmp_path)

    result = run(FakeEngine(), "0", [Scorer("a", act=act)], tmp_path)
    assert "is in use by another sweep" in result.failures[0].error


class Nameless:
    name, higher_is_better = "", True

    def __call__(self, engine: Engine) -> Score:
        raise AssertionError


@pytest.mark.parametrize(
    ("engine", "points", "scorers", "message"),
    [
        (FakeEngine(), "0", [], "at least one evaluator"),
        (FakeEngine(), "0", [Scorer("a"), Scorer("a")], "two evaluators are called `a`"),
        (FakeEngine(), "0", [lambda engine: None], "a function is not an evaluator"),
        (FakeEngine(), "0", [Nameless()], "'' is not a name"),
        (object(), "0", [Scorer("a")], "a object is not an engine"),
        (FakeEngine(), "0:1", [Scorer("a")], "not a range"),
    ],
)
def test_wrong_usage_touches_nothing(
    tmp_path: Path, engine: Any, points: str, scorers: list[Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(engine, points, scorers, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Told:
    """Keeps what the driver tells."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def noted(self, note: str) -> None:
        self.told.append(("noted", note))

    def begin(self, points: int, finished: int) -> None:
        self.told.append(("begin", points, finished))

    def switched(self, lam: Any, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("switched", lam.key))

    def evaluating(self, lam: Any, evaluator: str) -> None:
        self.told.append(("evaluating", lam.key, evaluator))

    def recorded(self, entry: JournalEntry) -> None:
        self.told.append(("recorded", entry.lam, entry.evaluator, entry.finished))

    def end(self) -> None:
        self.told.append(("end",))


def test_progress_is_told_in_order_and_always_ended(tmp_path: Path) -> None:
    run(FakeEngine(), "0", [Scorer("a")], tmp_path)
    told = Told()
    run(FakeEngine(), "0,1", [Scorer("a"), Scorer("b")], tmp_path, progress=told)
    point = [("evaluating", "0", "b"), ("recorded", "0", "b", True)]
    one = [
        ("evaluating", "1", "a"),
        ("recorded", "1", "a", True),
        ("evaluating", "1", "b"),
        ("recorded", "1", "b", True),
    ]
    assert told.told == [
        ("begin", 4, 1),
        ("switched", "0"),
        *point,
        ("switched", "1"),
        *one,
        ("end",),
    ]

    def stop(engine: Engine) -> None:
        raise KeyboardInterrupt

    told = Told()
    with pytest.raises(KeyboardInterrupt):
        run(FakeEngine(), "0.5", [Scorer("c", act=stop)], tmp_path, progress=told)
    assert told.told[-1] == ("end",)


def test_an_evaluator_that_leaves_another_model_behind_fails_by_name(tmp_path: Path) -> None:
    engine = FakeEngine()
    spoilt = Scorer("spoilt", act=lambda e: e.stale.add(0.5))  # type: ignore[attr-defined]
    result = run(engine, "0.5", [spoilt, Scorer("next")], tmp_path)
    assert [failure.evaluator for failure in result.failures] == [
        "spoilt",
        "next",
    ], "no proof, no evaluation"
    assert "evaluator `spoilt` changed the model" in result.failures[0].error
    assert result.rows == ()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), Unprintable()])
def test_whatever_an_evaluator_raises_fails_its_point_alone(
    tmp_path: Path, error: BaseException
) -> None:
    def act(engine: Engine) -> None:
        raise error

    result = run(FakeEngine(), "0,1", [Scorer("bad", act=act), Scorer("good")], tmp_path)
    assert [(f.lam.key, f.evaluator) for f in result.failures] == [("0", "bad"), ("1", "bad")]
    assert [row.evaluator for row in result.rows] == ["good", "good"]


@pytest.mark.parametrize(
    "error",
    [
        EvaluatorError(""),
        EvaluatorError(" \n "),
        EvaluatorError("", "mend it"),
        ValueError(),
        KeyError("\n\n"),
    ],
)
def test_an_error_that_says_nothing_is_named_by_its_kind(tmp_path: Path, error: Exception) -> None:
    def act(engine: Engine) -> None:
        raise error

    console = Console(file=io.StringIO(), width=200)
    failing = Scorer("silent", act=act)
    result = run(
        FakeEngine(), "0", [failing, Scorer("next")], tmp_path, progress=TerminalProgress(console)
    )
    assert type(error).__name__ in result.failures[0].error and len(result.rows) == 1
    (line,) = (line for line in console.file.getvalue().splitlines() if "silent" in line)  # type: ignore[attr-defined]
    assert f"failed: {type(error).__name__}" in line


def test_an_evaluator_without_a_finished_point_may_change_or_leave(tmp_path: Path) -> None:
    def act(engine: Engine) -> None:
        raise ValueError("a bug of mine")

    good = Scorer("good")
    assert (
        len(
            run(
                FakeEngine(),
                "0,1",
                [good, Scorer("mine", act=act, identity={"source": 1})],
                tmp_path,
            ).failures
        )
        == 2
    )
    mended = run(FakeEngine(), "0", [good, Scorer("mine", identity={"source": 2})], tmp_path)
    assert mended.failures == () and len(mended.scores("mine")) == 1
    with pytest.raises(RunError, match="mine"):
        run(FakeEngine(), "0", [good, Scorer("mine", identity={"source": 3})], tmp_path)
    other = tmp_path / "other"
    run(FakeEngine(), "0,1", [good, Scorer("mine", act=act)], other)
    left = run(FakeEngine(), "0,1", [good], other)
    assert left.failures == () and left.evaluators == ("good",)


def test_a_kill_in_the_middle_of_overwriting_leaves_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(FakeEngine(), "0,1", [Scorer("good")], tmp_path)
    unlink = Path.unlink
    for survivors in range(6):
        calls = []

        def dying(
            path: Path, missing_ok: bool = False, calls: list[Path] = calls, most: int = survivors
        ) -> None:
            calls.append(path)
            if len(calls) > most:
                raise KeyboardInterrupt
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dying)
            run(FakeEngine(), "0,1", [Scorer("good")], tmp_path, overwrite=True)
        assert len(run(FakeEngine(), "0,1", [Scorer("good")], tmp_path).rows) == 2


def test_one_evaluator_instead_of_a_list_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one evaluator instead of a list"):
        run(FakeEngine(), "0", Scorer("good"), tmp_path)  # type: ignore[arg-type]


def test_details_and_files_of_a_score_are_kept(tmp_path: Path) -> None:
    class Speaker(Scorer):
        def __call__(self, engine: Engine) -> Score:
            score = super().__call__(engine)
            said = {"outputs.jsonl": f"λ = {engine.weights.lam}\n", "b.txt": ""}
            return dataclasses.replace(score, details={"truncated": 0.25}, files=said)

    result = sweep(FakeEngine(), "0,1/3", [Speaker("icl"), Scorer("plain")], tmp_path, figure=False)
    assert [row.details for row in result.rows] == [
        {"truncated": 0.25},
        {},
        {"truncated": 0.25},
        {},
    ]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0]["details"] == {"truncated": 0.25} and "details" not in rows[1]
    first, _, second, _ = journal.read(tmp_path)
    assert first.outputs == "outputs/lambda=0.icl"
    assert (tmp_path / str(first.outputs) / "outputs.jsonl").read_text() == "λ = 0.0\n"
    assert (tmp_path / str(second.outputs) / "outputs.jsonl").read_text().startswith("λ = 0.3333")
    assert (tmp_path / str(second.outputs) / "b.txt").read_text() == ""
    sweep(FakeEngine(), "0", [Scorer("plain")], tmp_path, overwrite=True, figure=False)
    assert not list((tmp_path / "outputs").iterdir())


@pytest.mark.parametrize("changes", [{"unit": "other"}, {"n": 1, "items": ()}])
def test_a_point_that_compares_with_no_other_fails(tmp_path: Path, changes: dict[str, Any]) -> None:
    class Drifting(Scorer):
        def __call__(self, engine: Engine) -> Score:
            score = super().__call__(engine)
            return dataclasses.replace(score, **changes) if engine.weights.lam == 0.5 else score

    result = sweep(
        FakeEngine(), "0,0.5,1", [Drifting("icl"), Scorer("plain", "nats")], tmp_path, figure=False
    )
    assert [(failure.lam.key, failure.evaluator) for failure in result.failures] == [("0.5", "icl")]
    assert "4 in `accuracy` at λ = 0" in result.failures[0].error and len(result.rows) == 5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"value": "0.5"}, "two numbers are expected"),
        ({"n": True}, "two numbers are expected"),
        ({"details": {"truncated": float("nan")}}, "detail `truncated`"),
        ({"files": {"../escape": ""}}, "a file '../escape'"),
        ({"files": {".hidden": ""}}, "a file '.hidden'"),
        ({"files": {"a.txt": b"bytes"}}, "a file 'a.txt'"),
    ],
)
def test_details_and_files_that_cannot_be_kept_fail_the_point(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    class Wrong(Scorer):
        def __call__(self, engine: Engine) -> Score:
            return dataclasses.replace(super().__call__(engine), **changes)

    result = sweep(FakeEngine(), "0", [Wrong("icl")], tmp_path / "out", figure=False)
    assert not result.rows and why in result.failures[0].error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


class Checked(Scorer):
    """A scorer that says beforehand what it thinks of the engine."""

    def __init__(self, name: str, outcome: Any):
        super().__init__(name)
        self.outcome = outcome

    def check(self, engine: Engine) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    "error", [EvaluatorError("9 of 9 items do not fit", "take fewer"), KeyError("column")]
)
def test_a_doomed_evaluator_ends_the_sweep_before_its_first_λ(
    tmp_path: Path, error: Exception
) -> None:
    engine, fine = FakeEngine(), Scorer("fine")
    with pytest.raises(EvaluatorError, match="evaluator `doomed`: ") as caught:
        run(engine, "0:1:0.1", [fine, Checked("doomed", error)], tmp_path / "out")
    assert (
        "9 of 9" in caught.value.message or "KeyError: 'column'" in caught.value.message
    ) and not fine.calls
    assert not engine.weights.switches and not (tmp_path / "out").exists()


def test_notes_of_evaluators_are_told_once(tmp_path: Path) -> None:
    told: list[str] = []

    class Listening(Silent):
        def noted(self, note: str) -> None:
            told.append(note)

    scorers = [Checked("a", ["2 of 9 items are left out"]), Checked("b", None), Scorer("c")]
    run(FakeEngine(), "0:1:0.1", scorers, tmp_path, progress=Listening())
    assert told == ["a: 2 of 9 items are left out"]


def test_a_failure_in_the_same_words_is_not_repeated_at_every_λ(tmp_path: Path) -> None:
    def fail(engine: Engine) -> None:
        raise KeyError("column")

    def fail_by_λ(engine: Engine) -> None:
        raise ValueError(f"overflow at {engine.weights.lam}")

    same, other, fine = Scorer("same", act=fail), Scorer("other", act=fail_by_λ), Scorer("fine")
    result = run(FakeEngine(), "0:1:0.1", [same, other, fine], tmp_path)
    assert (len(same.calls), len(other.calls), len(fine.calls)) == (2, 11, 11)
    assert len([failure for failure in result.failures if failure.evaluator == "same"]) == 2
    assert failing_alike(result) == {"same", "other"}
    run(FakeEngine(), "0:1:0.1", [same, other, fine], tmp_path)
    assert len(same.calls) == 4, "the next run tries it again"
    mended = Scorer("same")
    assert not [
        f
        for f in run(FakeEngine(), "0:1:0.1", [mended, fine], tmp_path).failures
        if f.evaluator == "same"
    ]
    assert len(mended.calls) == 11


@pytest.mark.parametrize(
    ("errors", "alike"),
    [
        ({"0": "no key", "0.5": "no key"}, True),
        ({"0.5": "no key"}, False),  # one λ decides nothing
        ({"0": "no key", "0.5": "out of memory"}, False),
        ({"0": "bad at λ = 0.0", "0.5": "bad at λ = 0.5", "1": "bad at λ = 1.0"}, True),
        ({"1/3": "bad at 0.33: 9 of 9", "2/3": "bad at 0.67: 9 of 9"}, True),
        ({"1/3": "bad at 1/3", "2/3": "bad at 2/3"}, True),
        ({"0.5": "1 of 9 at 0.5", "1": "1 of 9 at 1"}, True),  # a count may look like λ
        ({"0.00001": "at 1e-05", "-0.2": "at -0.2"}, True),
        ({"0": "tried 3 GiB", "0.5": "tried 4 GiB"}, False),
        ({"0": "bad at 0.5", "0.5": "bad at 0"}, False),
        ({"0": "bad at 0 and 0", "0.5": "bad at 0.5"}, False),
    ],
)
def test_failures_are_alike_up_to_their_own_λ(
    tmp_path: Path, errors: dict[str, str], alike: bool
) -> None:
    failures = tuple(Failure(Lambda(lam), "a", error) for lam, error in errors.items())
    result = run(FakeEngine(), "0", [Scorer("b")], tmp_path)
    result = dataclasses.replace(result, failures=failures)
    assert failing_alike(result) == ({"a"} if alike else set())
    scored = dataclasses.replace(result.rows[0], evaluator="a")
    assert not failing_alike(dataclasses.replace(result, rows=(scored,)))


def test_an_evaluator_that_has_worked_before_is_always_tried(tmp_path: Path) -> None:
    broken = {0.5, 0.6, 0.7, 0.8}

    def act(engine: Engine) -> None:
        if round(engine.weights.lam or 0, 3) in broken:
            raise ValueError("out of luck")

    scorer = Scorer("a", act=act)
    assert len(run(FakeEngine(), "0:1:0.1", [scorer], tmp_path).failures) == 4
    scorer.calls.clear()
    assert len(run(FakeEngine(), "0:1:0.1", [scorer], tmp_path).failures) == len(scorer.calls) == 4

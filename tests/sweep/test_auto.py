"""Adaptive schedules in sweeps: which λ are added, by whom, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.base import Engine, Item, Lambda, Score
from pa_fast.errors import StatisticsError, UsageError
from pa_fast.question import parse_keep
from pa_fast.stats import adaptive, analyse
from pa_fast.sweep import journal, manifest, sweep
from pa_fast.sweep.report import report
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule
from tests import patience, programs
from tests.stats.acceptance import adaptive_sweep
from tests.sweep import planted
from tests.sweep.fakes import FakeEngine, Scorer
from tests.sweep.planted import Planted
from tests.sweep.test_kills import ROOT

FILES = ("results.csv", "results.json")


class Notes:
    """Keeps what a terminal would show."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.points = 0

    def noted(self, note: str) -> None:
        self.texts.append(note)

    def extended(self, points: int, why: str) -> None:
        self.points = points
        self.texts.append(why)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    out = tmp_path_factory.mktemp("auto") / "whole"
    planted.run(out)
    return out


def assert_same(out: Path, whole: Path) -> None:
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(manifest.load(out).lambdas) == sorted(manifest.load(whole).lambdas)


def test_the_λ_are_those_of_the_method(tmp_path: Path) -> None:
    notes, evaluator = Notes(), Planted("icl")
    result = pa_fast.sweep(FakeEngine(), "auto", evaluator, tmp_path, progress=notes, figure=False)
    lams, _ = adaptive_sweep(evaluator.items)
    assert sorted(evaluator.calls) == pytest.approx(lams) and len(lams) <= 12
    assert evaluator.calls[:6] == list(adaptive.COARSE)
    assert notes.points == len(lams) == len(result.rows)
    added = [text for text in notes.texts if " added: " in text]
    assert added and "λ = 0.3, 0.5, 0.7 added: the best λ lies in" in added[0]
    assert notes.texts[-1].startswith("no λ is added: ")
    document = json.loads((tmp_path / "results.json").read_text())
    assert next(iter(document)) == "answer"
    assert document["answer"]["sentence"] == result.answer().sentence
    assert document["answer"]["lambda"] == result.answer().chosen.key


def test_a_sweep_that_goes_on_adds_no_other_λ(tmp_path: Path, whole: Path) -> None:
    engine, evaluators = planted.made()
    stopping = evaluators[1]

    class Stopped:
        def __init__(self, after: int):
            self.left = after

        def recorded(self, entry: object) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    for after in (3, 9, 4, 100):
        try:
            sweep(
                engine,
                planted.SCHEDULE,
                evaluators,
                tmp_path,
                progress=Stopped(after),
                figure=False,
            )
        except KeyboardInterrupt:
            continue
    assert isinstance(stopping, Planted) and len(stopping.calls) == len(set(stopping.calls))
    assert_same(tmp_path, whole)
    again = Notes()
    sweep(engine, planted.SCHEDULE, evaluators, tmp_path, progress=again, figure=False)
    assert len(stopping.calls) == len(set(stopping.calls))


def test_shards_add_the_same_λ_and_share_them(tmp_path: Path, whole: Path) -> None:
    running = [
        programs.Program(planted.run, tmp_path, (rank, 2), 0.02, folder=tmp_path.parent)
        for rank in range(2)
    ]
    for process in running:
        _, errors = patience.communicate(process)
        assert process.returncode == 0, errors
    assert_same(tmp_path, whole)
    tried = [(e.lam, e.evaluator) for e in journal.read(tmp_path)]
    assert len(tried) == len(set(tried))
    for rank in range(2):
        lines = (tmp_path / f"journal.{rank}-of-2.jsonl").read_text().splitlines()
        assert len(lines) >= len(tried) // 3


def test_other_λ_of_the_folder_stay(tmp_path: Path) -> None:
    engine, evaluators = planted.made()
    sweep(engine, "0,0.5,1", evaluators, tmp_path, figure=False)
    result = sweep(engine, planted.SCHEDULE, evaluators, tmp_path, figure=False)
    lams, _ = adaptive_sweep(planted.planted("peak +5", 4000, 0))
    assert {lam.key for lam in result.lambdas} >= {Lambda(f"{lam:.6g}").key for lam in lams[:-1]}
    assert len(evaluators[0].calls) == len(set(evaluators[0].calls))  # type: ignore[attr-defined]


def test_a_λ_without_a_score_ends_it(tmp_path: Path) -> None:
    engine, notes = FakeEngine(), Notes()
    engine.stale = {0.4}
    out = tmp_path / "out"
    result = sweep(engine, planted.SCHEDULE, planted.made()[1], out, progress=notes, figure=False)
    assert {failure.lam.key for failure in result.failures} == {"0.4"}
    assert notes.texts[-1] == "no λ is added: `icl` has no score at λ = 0.4"
    engine.stale = set()
    again = sweep(engine, planted.SCHEDULE, planted.made()[1], out, figure=False)
    assert len(again.lambdas) > 6 and not again.failures


def test_points_that_failed_are_not_tried_again_by_the_next_λ(tmp_path: Path) -> None:
    class Odd(Scorer):
        def __call__(self, engine: Engine) -> Score:
            self.calls.append(engine.weights.lam or 0.0)
            if engine.weights.lam in (0.2, 0.6):
                raise RuntimeError(f"failed at {engine.weights.lam}")
            return super().__call__(engine)

    odd = Odd("odd")
    result = sweep(FakeEngine(), planted.SCHEDULE, [Planted("icl"), odd], tmp_path, figure=False)
    assert len(result.failures) == 2 and odd.calls.count(0.2) == 1


class Few(Planted):
    """A score of `count` items, in truth and as it says; None: it says nothing."""

    def __init__(self, name: str, count: int, says: int | None = None):
        super().__init__(name)
        self.count, self.says = count, says

    def item_count(self, engine: Engine) -> int | None:
        return self.says

    def __call__(self, engine: Engine) -> Score:
        self.calls.append(engine.weights.lam or 0.0)
        items = [Item(str(k), "all", 0.5) for k in range(self.count)]
        return Score(0.5, "accuracy", max(self.count, 1), items)


@pytest.mark.parametrize("role", ["objective of auto", "share of auto", "share of a list"])
@pytest.mark.parametrize(
    ("count", "says", "message"),
    [
        (1, 1, "`few`: the score has 1 item, of at least 2"),
        (1, None, "`few`: the score has 1 item, of at least 2"),
        (0, None, "`few`: the score has no items"),
    ],
)
def test_too_few_items_are_refused_at_the_first_λ_or_before(
    tmp_path: Path, role: str, count: int, says: int | None, message: str
) -> None:
    few, icl = Few("few", count, says), Planted("icl")
    objective, keep = ("few", None) if role.startswith("objective") else ("icl", {"few": 0.9})
    lambdas = "0,0.5,1" if role.endswith("list") else "auto"
    for _ in range(2):  # a second attempt does not evaluate more
        with pytest.raises(StatisticsError, match=message) as refused:
            pa_fast.sweep(
                FakeEngine(),
                lambdas,
                [few, icl],
                tmp_path / "out",
                objective=objective,
                keep=keep,
                figure=False,
            )
        assert len(few.calls) == (0 if says else 1)
    hint = "split=blank" if count else "pa_fast.Score"
    assert refused.value.hint is not None and hint in refused.value.hint


def test_items_that_do_not_make_up_the_score_are_refused_at_the_first_λ(tmp_path: Path) -> None:
    class Other(Planted):
        def __call__(self, engine: Engine) -> Score:
            score = super().__call__(engine)
            return Score(score.value + 0.1, score.unit, score.n, score.items)

    with pytest.raises(StatisticsError, match="items that make up the score of `other`"):
        sweep(FakeEngine(), "auto", [Other("other")], tmp_path, figure=False)
    assert len(journal.read(tmp_path)) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_share_of_a_score_that_is_not_measured_is_refused(
    tmp_path: Path, overwrite: bool
) -> None:
    def run(lambdas: str, keep: dict[str, float] | None, overwrite: bool = False) -> SweepResult:
        engine, evaluators = planted.made()
        return pa_fast.sweep(
            engine, lambdas, evaluators, tmp_path, keep=keep, overwrite=overwrite, figure=False
        )

    with pytest.raises(UsageError, match=r"`follow` is to keep 90 % of its score at λ = 1"):
        run("0,0.5", {"follow": 0.9})
    assert not list(tmp_path.iterdir())
    run("0,1", None)
    if not overwrite:  # the folder has it
        assert run("0.5", {"follow": 0.9}).answer().keep == {"follow": 0.9}
        return
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(UsageError, match="does not evaluate λ = 1"):
        run("0.5", {"follow": 0.9}, overwrite=True)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": ["follow>=98%"]}, "keep is a list, expected a dict"),
        ({"keep": "follow>=98%"}, "keep is a str, expected a dict"),
        ({"keep": {1: 0.98}}, "keep has the key 1, expected the name"),
        ({"keep": {"follow": "98%"}}, "`follow` is to keep '98%' of its score"),
        ({"keep": {"follow": float("nan")}}, "`follow` is to keep nan of its score"),
        ({"objective": 3}, "3 is not the name of an evaluator"),
        ({"keep": {"icl": 0.98}}, "`icl` is to keep 98 % .* the objective itself"),
        (
            {"objective": "follow", "keep": {"foll": 1}},
            "`follow` is to keep 100 % .* the objective",
        ),
    ],
)
def test_questions_that_are_none_are_refused_wherever_they_are_asked(
    tmp_path: Path, whole: Path, asked: dict[str, Any], message: str
) -> None:
    engine, evaluators = planted.made()
    with pytest.raises(UsageError, match=message):
        pa_fast.sweep(engine, "0,1", evaluators, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    result = SweepResult.load(whole)
    with pytest.raises(UsageError, match=message):
        result.answer(**asked)
    with pytest.raises(UsageError, match=message):
        report([whole], figure=False, **asked)
    asked.setdefault("objective", "icl")
    if "foll" not in asked.get("keep", ()) and asked["objective"] != 3:  # no beginnings there
        with pytest.raises(UsageError, match=message):
            analyse(result.evaluations(), **asked)


def test_the_objective_beside_a_share_is_the_first_of_the_sweep(tmp_path: Path) -> None:
    engine, (icl, follow) = planted.made()
    sweep(engine, "0,1", [follow], tmp_path, figure=False)
    result = pa_fast.sweep(
        engine, "0,0.5,1", [icl, follow], tmp_path, keep={"follow": 0.5}, figure=False
    )
    assert result.evaluators[0] == "follow" and result.answer().objective.name == "icl"


@pytest.mark.parametrize("keep", [None, {"follow": 0.9}])
@pytest.mark.parametrize("shape", ["peak +5", "flat", "monotone"])
def test_reasons_name_the_range_of_the_answer(
    tmp_path: Path, shape: str, keep: dict[str, float] | None
) -> None:
    class Ranges(Notes):
        """The range of the answer after each step, beside the reason."""

        def extended(self, points: int, why: str) -> None:
            self.noted(why)

        def noted(self, note: str) -> None:
            low, high = SweepResult.load(tmp_path).answer().objective.range
            self.texts.append(note)
            assert f"the best λ lies in {low.key}–{high.key}; " in note
            assert ("; of the λ that keep 90 % of follow, " in note) == bool(keep)

    notes = Ranges()
    evaluators = [Planted("icl", shape), Planted("follow", "monotone", 1000, 1)]
    schedule = Schedule.of("auto", "icl", keep)
    sweep(FakeEngine(), schedule, evaluators, tmp_path, progress=notes, figure=False)
    assert notes.texts and notes.texts[-1].startswith("no λ is added: ")


def test_a_share_to_keep_bounds_the_search(tmp_path: Path) -> None:
    def lams(keep: dict[str, float] | None, out: str) -> list[float]:
        schedule = Schedule.of("auto", "icl", keep)
        follow = Planted("follow", "monotone", 5_000, 1)
        icl = Planted("icl", "peak +5", 5_000)
        result = sweep(FakeEngine(), schedule, [icl, follow], tmp_path / out, figure=False)
        if keep:
            answer = result.answer()
            assert answer.keep == keep and answer.allowed is not None
            assert answer.chosen in answer.allowed
        return [float(lam) for lam in result.lambdas]

    free, kept = lams(None, "free"), lams({"follow": 0.97}, "kept")
    # 0.7 − 0.1 (1 − λ)² is 97 % of 0.7 at λ = 0.54; the peak, at 0.55, is not to be told from it
    assert max(set(kept) - set(free), default=1.0) >= 0.5
    assert {"keep", "objective"} <= json.loads((tmp_path / "kept/run.json").read_text()).keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 5}, "a budget of 5 λ"),
        ({"budget": True}, "a budget of True λ"),
        ({}, "needs the one whose best λ"),
        ({"objective": "ilc"}, "no evaluator is called `ilc`"),
        ({"objective": "icl", "keep": {"x": 0.9}}, "no evaluator is called `x`"),
        ({"objective": "icl", "keep": {"follow": 98}}, "to keep 98 of its score"),
        ({"lambdas": "0:1:0.5", "budget": 9}, "a budget for λ that are all named"),
        ({"lambdas": "auto,0.5"}, "`auto` stands alone"),
    ],
)
def test_questions_that_cannot_be_answered(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    engine, evaluators = planted.made()
    with pytest.raises(UsageError, match=message):
        pa_fast.sweep(engine, given.pop("lambdas", "auto"), evaluators, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_budget_ends_the_schedule(tmp_path: Path) -> None:
    notes = Notes()
    schedule = Schedule.of("auto", "icl", budget=7)
    result = sweep(
        FakeEngine(), schedule, planted.made()[1], tmp_path, progress=notes, figure=False
    )
    assert len(result.lambdas) == 7
    assert notes.texts[0].startswith("λ = 0.5 added: ")
    assert notes.texts[0].endswith("; 0.3, 0.7 beyond the budget of 7 λ")
    spent = "no λ is added: the budget of 7 λ is spent; next would be 0.3, 0.7: the best λ lies in "
    assert notes.texts[1].startswith(spent)


def test_shares_to_keep_are_read() -> None:
    assert parse_keep(["ifeval>=98%", "a b ≥ 0.5", "x>=.25"]) == {
        "ifeval": 0.98,
        "a b": 0.5,
        "x": 0.25,
    }
    for text in ("ifeval", "ifeval>98%", ">=98%", "ifeval>=", "ifeval>=198%", "ifeval>=0%"):
        with pytest.raises(UsageError, match=r"SHARE|keep"):
            parse_keep([text])
    with pytest.raises(UsageError, match="two shares"):
        parse_keep(["a>=1", "a>=0.5"])


@pytest.mark.slow
def test_a_storm_of_kills_leaves_the_files_of_an_undisturbed_sweep(
    tmp_path: Path, whole: Path
) -> None:
    out, chance = tmp_path / "out", random.Random(0)
    program = [sys.executable, "-m", "tests.sweep.planted", str(out)]

    def start(rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*program, str(rank), "2", "0.2"], cwd=ROOT)

    running, kills = [start(0), start(1)], 0
    while kills < int(os.environ.get("PA_FAST_KILLS", 50)):
        time.sleep(chance.uniform(0.2, 4.0))
        rank = chance.randrange(2)
        running[rank].kill()
        running[rank].wait()
        kills += 1
        running[rank] = start(rank)
    assert [one.wait(300) for one in running] == [0, 0]
    assert_same(out, whole)
    tried = [(e.lam, e.evaluator) for e in journal.read(out)]
    assert len(tried) == len(set(tried))

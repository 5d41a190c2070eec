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
from pa_fast.base import Engine, Lambda, Score
from pa_fast.errors import StatisticsError, UsageError
from pa_fast.stats import adaptive
from pa_fast.sweep import journal, manifest, sweep
from pa_fast.sweep.schedule import Schedule, parse_keep
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
    program = [sys.executable, "-m", "tests.sweep.planted", str(tmp_path)]
    running = [subprocess.Popen([*program, str(rank), "2", "0.02"], cwd=ROOT) for rank in range(2)]
    assert [one.wait(300) for one in running] == [0, 0]
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


def test_items_that_are_no_items_are_refused_by_name(tmp_path: Path) -> None:
    class Bare(Planted):
        def __call__(self, engine: Engine) -> Score:
            return Score(super().__call__(engine).value, "accuracy", self.items.y.shape[0])

    with pytest.raises(StatisticsError, match="items that make up the score of `bare`"):
        sweep(FakeEngine(), "auto", [Bare("bare")], tmp_path, figure=False)
    assert len(journal.read(tmp_path)) == 6


def test_a_share_to_keep_bounds_the_search(tmp_path: Path) -> None:
    def lams(keep: dict[str, float] | None, out: str) -> list[float]:
        schedule = Schedule.of("auto", "icl", keep)
        follow = Planted("follow", "monotone", 20_000, 1)
        icl = Planted("icl", "peak +5", 20_000)
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
    assert len(result.lambdas) == 7 and "the budget is 7 λ" in notes.texts[0]


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

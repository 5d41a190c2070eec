"""Several processes, one run folder: together they are one sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from pa_fast.errors import RunError, UsageError
from pa_fast.sweep import journal, sweep
from pa_fast.sweep.entry import Shard
from pa_fast.sweep.journal import Journal
from tests import patience, programs
from tests.sweep.fakes import FakeEngine, Scorer

LAMBDAS = "0:1:0.05"


def scorers() -> list[Scorer]:
    return [Scorer("icl"), Scorer("perplexity", "nats", higher=False)]


def test_shards_take_every_point_once() -> None:
    points = list(range(11))
    for world in (1, 2, 3, 11, 20):
        taken = [Shard(rank, world).of(points) for rank in range(world)]
        assert sorted(point for part in taken for point in part) == points
    assert Shard.parse("2/8") == Shard(2, 8) and Shard(2, 8).name == "2-of-8"
    for text in ("8/8", "-1/8", "1", "1/0", "a/b", "1/2/3", "²/3"):
        with pytest.raises(UsageError, match=f"shard .*{text[0]}"):
            Shard.parse(text)


def test_shards_one_after_the_other_equal_one_process(tmp_path: Path) -> None:
    whole = sweep(FakeEngine(), LAMBDAS, scorers(), tmp_path / "whole", figure=False)
    for rank in (2, 0, 1):
        result = sweep(
            FakeEngine(), LAMBDAS, scorers(), tmp_path / "out", figure=False, shard=(rank, 3)
        )
    assert result.rows == whole.rows
    for name in ("results.csv", "results.json", "run.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "out").glob("journal.*-of-3.jsonl"))) == 3


def test_what_shards_finished_is_finished_for_all(tmp_path: Path) -> None:
    sweep(FakeEngine(), LAMBDAS, scorers(), tmp_path, figure=False, shard=(0, 2))
    again = scorers()
    result = sweep(FakeEngine(), LAMBDAS, again, tmp_path, figure=False, shard=(0, 3))
    assert again[0].calls == [
        pytest.approx(lam) for lam in (0.15, 0.45, 0.75)
    ]  # of 0, .15, .3, …: those that 0/2 left
    rest = scorers()
    result = sweep(FakeEngine(), LAMBDAS, rest, tmp_path, figure=False)
    assert len(result.rows) == 42 and len(rest[0].calls) == 21 - 11 - 3
    last = scorers()
    sweep(FakeEngine(), LAMBDAS, last, tmp_path, figure=False, shard=(1, 2))
    assert not last[0].calls


def test_failures_are_those_of_the_shard(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.stale = {0.05, 0.1}
    result = sweep(engine, LAMBDAS, scorers(), tmp_path, figure=False, shard=(1, 2))
    assert {failure.lam.key for failure in result.failures} == {"0.05"}
    assert {
        failure.lam.key
        for failure in sweep(
            engine, LAMBDAS, scorers(), tmp_path, figure=False, shard=(0, 2)
        ).failures
    } == {"0.1"}


def test_a_shard_shares_the_folder_with_shards_alone(tmp_path: Path) -> None:
    sweep(FakeEngine(), "0,1", scorers(), tmp_path, figure=False)
    with Journal(tmp_path, shard=Shard(0, 2)), Journal(tmp_path, shard=Shard(1, 2)):
        with pytest.raises(RunError, match=r"in use by another sweep\n"):
            Journal(tmp_path).__enter__()
        with pytest.raises(RunError, match=r"or by another process for shard 1-of-2"):
            Journal(tmp_path, shard=Shard(1, 2)).__enter__()
    with Journal(tmp_path), pytest.raises(RunError, match="in use by another sweep"):
        Journal(tmp_path, shard=Shard(0, 2)).__enter__()
    with pytest.raises(UsageError, match="overwrite and shard"):
        sweep(FakeEngine(), "0,1", scorers(), tmp_path, overwrite=True, shard=(0, 2))


def test_overwrite_removes_what_shards_wrote(tmp_path: Path) -> None:
    for rank in (0, 1):
        sweep(FakeEngine(), "0,1", scorers(), tmp_path, figure=False, shard=(rank, 2))
    other = FakeEngine({"base": "another"})
    assert len(sweep(other, "0.5", scorers(), tmp_path, overwrite=True, figure=False).rows) == 2
    assert not list(tmp_path.glob("journal.*-of-*.jsonl"))


def test_a_torn_line_of_one_shard_costs_its_point_alone(tmp_path: Path) -> None:
    whole = sweep(FakeEngine(), LAMBDAS, scorers(), tmp_path / "whole", figure=False)
    for rank in (0, 1):
        sweep(FakeEngine(), LAMBDAS, scorers(), tmp_path / "out", figure=False, shard=(rank, 2))
    part = tmp_path / "out" / "journal.1-of-2.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    assert len(journal.read(tmp_path / "out")) == 41
    again = scorers()
    result = sweep(FakeEngine(), LAMBDAS, again, tmp_path / "out", figure=False, shard=(1, 2))
    assert (len(again[0].calls), len(again[1].calls)) == (0, 1)
    assert result.rows == whole.rows


def of_six(out: Path, rank: int) -> None:
    sweep(FakeEngine(), LAMBDAS, scorers(), out, figure=False, shard=(rank, 6))


def test_shards_at_the_same_time_leave_whole_results(tmp_path: Path) -> None:
    whole = sweep(FakeEngine(), LAMBDAS, scorers(), tmp_path / "whole", figure=False)
    running = [
        programs.Program(of_six, tmp_path / "out", rank, folder=tmp_path) for rank in range(6)
    ]
    for process in running:
        _, errors = patience.communicate(process)
        assert process.returncode == 0, errors
    assert len(whole.rows) == 42
    for name in ("results.csv", "results.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

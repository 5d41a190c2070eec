"""run.json: another sweep does not go on in the folder, and is told what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast import LambdaRule
from pa_fast.base import complete
from pa_fast.errors import RunError, UsageError
from pa_fast.sweep import manifest
from pa_fast.sweep.schedule import Schedule
from tests.sweep.fakes import FakeEngine, Scorer

IDENTITY = {"base": "b0", "options": {"dtype": "bf16", "stop": (1, 2)}}


def write(
    folder: Path, engine: FakeEngine | None = None, points: str = "0,1", *scorers: Scorer
) -> manifest.Manifest:
    now = manifest.describe(
        complete(engine or FakeEngine(IDENTITY)), Schedule.of(points), scorers or (Scorer("icl"),)
    )
    return manifest.reconcile(folder, now)


def test_a_rule_that_the_weights_follow_is_part_of_the_run(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.weights.followed = LambdaRule([{"match": "head.*", "times": 0.5}])  # type: ignore[attr-defined]
    now = manifest.describe(complete(engine), Schedule.of("0"), [Scorer("a")])
    assert now.engine["rule"] == [{"match": "head.*", "times": "0.5"}]
    manifest.reconcile(tmp_path, now)
    engine.identity["rule"] = "what it was made with"
    engine.weights.followed = None  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"engine\.rule: recorded \[.*now nothing"):
        manifest.reconcile(
            tmp_path, manifest.describe(complete(engine), Schedule.of("0"), [Scorer("a")])
        )


def test_read_back_as_written(tmp_path: Path) -> None:
    written = write(tmp_path)
    assert manifest.load(tmp_path) == written
    assert written.lambdas == ("0", "1")
    assert written.evaluators == (manifest.EvaluatorRecord("icl", True, {"data": "d0"}),)
    assert written.engine == {"base": "b0", "options": {"dtype": "bf16", "stop": [1, 2]}}
    assert "python" in written.versions[0]


def test_the_same_sweep_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / manifest.NAME).stat()
    write(tmp_path)
    assert (tmp_path / manifest.NAME).stat().st_mtime_ns == before.st_mtime_ns


def test_points_and_evaluators_are_added_in_order(tmp_path: Path) -> None:
    write(tmp_path)
    added = write(tmp_path, None, "0.5,1", Scorer("b"), Scorer("a"))
    assert added.lambdas == ("0", "1", "0.5")
    assert [column.name for column in added.evaluators] == ["icl", "b", "a"]
    assert manifest.load(tmp_path) == added


def test_another_engine_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / manifest.NAME).read_bytes()
    other = FakeEngine({"base": "b1", "options": {"stop": [1, 2]}, "seed": 3})
    with pytest.raises(RunError) as caught:
        write(tmp_path, other)
    assert caught.value.message.splitlines()[1:] == [
        '  engine.base: recorded "b0", now "b1"',
        '  engine.options.dtype: recorded "bf16", now nothing',
        "  engine.seed: recorded nothing, now 3",
    ]
    assert "--out" in str(caught.value.hint) and "--overwrite" in str(caught.value.hint)
    assert (tmp_path / manifest.NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("scorer", "line"),
    [
        (Scorer("icl", identity={"data": "d1"}), 'evaluator `icl`.data: recorded "d0", now "d1"'),
        (
            Scorer("icl", identity={"data": "d0", "limit": 5}),
            "evaluator `icl`.limit: recorded nothing, now 5",
        ),
        (Scorer("icl", higher=False), "evaluator `icl`.higher_is_better: recorded true, now false"),
    ],
)
def test_a_changed_evaluator_is_refused(tmp_path: Path, scorer: Scorer, line: str) -> None:
    write(tmp_path)
    with pytest.raises(RunError) as caught:
        write(tmp_path, None, "0,1", scorer)
    assert line in caught.value.message


def test_numbers_of_another_type_differ(tmp_path: Path) -> None:
    write(tmp_path, FakeEngine({"seed": 1}))
    with pytest.raises(RunError, match="recorded 1, now true"):
        write(tmp_path, FakeEngine({"seed": True}))


def test_other_versions_are_recorded_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr("sys.version", "9.9 (main)")
    assert [versions["python"] for versions in write(tmp_path).versions][1:] == ["9.9"]
    assert len(write(tmp_path).versions) == 2


@pytest.mark.parametrize("identity", [{"x": object()}, {"x": float("nan")}])
def test_an_identity_that_json_cannot_hold_is_wrong_usage(
    tmp_path: Path, identity: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="the identity of evaluator `icl` cannot be recorded"):
        write(tmp_path, None, "0,1", Scorer("icl", identity=identity))
    assert not list(tmp_path.iterdir())


def test_a_missing_or_later_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        manifest.load(tmp_path)
    written = json.loads(write(tmp_path).to_bytes())
    path = tmp_path / manifest.NAME
    path.write_text(json.dumps({**written, "format": 2}))
    with pytest.raises(RunError, match="has format 2, and this version reads 1"):
        manifest.load(tmp_path)
    changes: list[dict[str, Any]] = [
        {"lambdas": ["x"]},
        {"lambdas": 3},
        {"engine": []},
        {"evaluators": [{"name": "icl"}]},
        {"versions": [1]},
    ]
    for change in changes:
        path.write_text(json.dumps({**written, **change}))
        with pytest.raises(RunError, match="is damaged"):
            manifest.load(tmp_path)
    for text in ("", "{", "[]", "\0", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(RunError, match="is damaged"):
            manifest.load(tmp_path)


def test_the_command_is_recorded_once_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["sweep", "base", "--out", "my run"],
        ["sweep", "base", "--out", "my run"],
        ["sweep", "base", "--limit", "3"],
    ):
        monkeypatch.setattr("sys.argv", ["/usr/bin/pa-fast", *arguments])
        pa_fast.sweep(FakeEngine(), "0", [Scorer("a")], tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / manifest.NAME).read_text())
    assert recorded["commands"] == [
        {"command": "pa-fast sweep base --out 'my run'", "folder": str(tmp_path)},
        {"command": "pa-fast sweep base --limit 3", "folder": str(tmp_path)},
    ]
    del recorded["commands"]  # as earlier versions wrote it
    (tmp_path / "run" / manifest.NAME).write_text(json.dumps(recorded))
    assert manifest.load(tmp_path / "run").commands == ()

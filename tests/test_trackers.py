"""Trackers: one run a sweep, λ as the step, offline; and what is said where a client is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.errors import MissingExtra, UsageError
from pa_fast.trackers import STEPS, TRACKERS, Tracker, tracker
from tests.sweep.fakes import FakeEngine, Scorer

LAMBDAS = "0,1/3,1"


def swept(one: Tracker, out: Path, lambdas: str = LAMBDAS) -> pa_fast.SweepResult:
    try:
        return pa_fast.sweep(FakeEngine(), lambdas, Scorer("icl"), out, callbacks=[one])
    finally:
        one.close()


class Recorded(Tracker):
    """Keeps what a client would be given."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        super().__init__(folder, config)
        self.calls: list[Any] = []

    def _open(self) -> None:
        self.calls.append("open")

    def _log(self, lam: float, figures: dict[str, float]) -> None:
        self.calls.append((lam, figures))

    def _conclude(self, answer: Any, picture: Path | None) -> None:
        self.calls.append((answer["sentence"], picture is not None))

    def _close(self) -> None:
        self.calls.append("close")


def test_a_sweep_is_one_run_with_its_answer(tmp_path: Path) -> None:
    one = Recorded(tmp_path, {})
    result = swept(one, tmp_path)
    first, *scores, end, last = one.calls
    assert (first, last) == ("open", "close") and end == (result.answer().sentence, True)
    assert [lam for lam, _ in scores] == [0.0, pytest.approx(1 / 3), 1.0]
    assert scores[0][1]["icl"] == result.rows[0].score and "effective_lambda" in scores[0][1]


def test_failed_points_are_left_out_and_nothing_is_opened_for_them(tmp_path: Path) -> None:
    engine, one = FakeEngine(), Recorded(tmp_path, {})
    engine.stale = {0.0, 1.0}
    pa_fast.sweep(engine, "0,1", Scorer("icl"), tmp_path, figure=False, callbacks=[one])
    one.close()
    assert one.calls == []


def test_the_id_is_that_of_the_folder(tmp_path: Path) -> None:
    a, b = (Recorded(tmp_path / name, {}) for name in "ab")
    assert a.key == Recorded(tmp_path / "a", {}).key != b.key and a.name == "a"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tracker `mlflow` is not available"):
        tracker("mlflow", tmp_path, {})
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for kind in TRACKERS:
        with pytest.raises(MissingExtra, match=kind) as caught:
            tracker(kind, tmp_path, {})
        assert f"pa_fast[{kind}]" in (caught.value.hint or "")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for lambdas in ("0,1", LAMBDAS):  # the second goes on with the first
        result = swept(tracker("tensorboard", tmp_path, {"base": "b"}), tmp_path, lambdas)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    steps = {event.step: event.value for event in events.Scalars("icl")}
    assert steps == {round(float(row.lam) * STEPS): pytest.approx(row.score) for row in result.rows}
    assert events.Images("trajectory")
    said = events.Tensors("answer/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert said == result.answer().sentence


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    swept(tracker("wandb", out, {"base": "b"}), out)
    [files] = out.glob("wandb/offline-run-*/run-*.wandb")
    content = files.read_bytes()
    assert b"icl" in content and b"lambda" in content and b"sentence" in content


def test_trackio_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    import sqlite3

    out = tmp_path / "run"
    swept(tracker("trackio", out, {"base": "b"}), out)
    [file] = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
    assert {0, round(STEPS / 3), STEPS} <= {step for step, _ in rows}
    assert any("icl" in str(metrics) for _, metrics in rows)

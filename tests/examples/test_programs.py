"""The programs under examples/ run as they stand, and give what they say."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pa_fast
import pa_fast.ray
from examples import cuda_graph_generate, own_engine, own_loop, ray_sweep
from tests import patience

ROOT = pathlib.Path(__file__).parents[2]
PAIR = ROOT / "examples" / "demo" / "pair"


def test_own_loop() -> None:
    losses = own_loop.main()
    base, instruct, inputs, labels = own_loop.pair()
    for lam, model in (("0", base), ("1", instruct)):
        with torch.no_grad():
            assert losses[lam] == float(
                torch.nn.functional.cross_entropy(model(inputs).float(), labels)
            )
    assert list(losses.values()) == sorted(losses.values(), reverse=True)


def test_own_engine(tmp_path: pathlib.Path) -> None:
    result = own_engine.main(str(tmp_path / "run"))
    scores = [row.score for row in result.rows]
    assert scores == sorted(scores) and scores[0] < 0 < scores[-1]
    assert own_engine.main(str(tmp_path / "run")).rows == result.rows
    assert len((tmp_path / "run" / "journal.jsonl").read_text().splitlines()) == 11, (
        "a finished point ran again"
    )


def test_own_engine_that_forgets_to_forget_is_wrong_and_one_that_lost_its_weights_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    engine = own_engine.BigramEngine(own_engine.Bigram("aaaa"), own_engine.Bigram("AAAA"))
    assert isinstance(engine, pa_fast.Engine)
    engine.model.table = torch.nn.Parameter(engine.model.table.clone(), requires_grad=False)
    result = pa_fast.sweep(engine, "0,1", [own_engine.Loudness()], tmp_path, figure=False)
    assert not result.rows and "no longer follows λ" in result.failures[0].error


def check_graph(device: str, tmp_path: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    said = cuda_graph_generate.main(device)
    assert len(set(said.values())) > 2
    for lam in ("0.25", "1"):
        pa_fast.merge(PAIR / "base", PAIR / "instruct", lam=lam, out=tmp_path / lam)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / lam, dtype="auto").to(device)
        tokenizer = pa_fast.load(PAIR / "base", PAIR / "instruct").tokenizer
        decoder = cuda_graph_generate.Decoder(model, length=64)
        assert tokenizer.decode(decoder.generate(tokenizer.encode("[rev owgny]"), 8)) == said[lam]


def test_cuda_graph_generate_without_a_gpu(tmp_path: pathlib.Path) -> None:
    check_graph("cpu", tmp_path)


@pytest.mark.gpu(only="CUDA graphs")
def test_cuda_graph_generate(tmp_path: pathlib.Path) -> None:
    check_graph("cuda", tmp_path)


def test_what_ray_sweep_gives_its_workers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray: the sweep that one worker would run."""

    def alone(make: Callable[[], Any], lambdas: str, out: str, workers: int) -> pa_fast.SweepResult:
        assert workers == 2
        engine, evaluators = pickle.loads(pickle.dumps(make))()
        return pa_fast.sweep(engine, lambdas, evaluators, out, figure=False)

    monkeypatch.setattr(pa_fast.ray, "sweep", alone)
    result = ray_sweep.main(str(tmp_path / "run"))
    assert [row.evaluator for row in result.rows] == ["2-shot"] * 5
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.slow
def test_ray_sweep(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "examples.ray_sweep", str(tmp_path / "run")]
    done = patience.run(command, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["evaluator"] for row in rows] == ["2-shot"] * 5

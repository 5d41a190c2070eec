"""The same sweep from the command line in one process, on Ray, and under torchrun: the same
results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pa_kernels.cores import one_core

import pa_fast.run
from pa_fast import cli
from pa_fast.errors import UsageError
from pa_fast.launch import lockstep, ray
from tests import patience, programs
from tests.engines.architectures import write_pair

pytestmark = pytest.mark.draws

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
SWEEP = [
    "sweep",
    str(DEMO / "pair" / "base"),
    str(DEMO / "pair" / "instruct"),
    "--lambdas",
    "0:1:0.5",
    "--eval",
    f"icl:{DEMO / 'fewshot.jsonl'},shots=1,sep=\\n",
    "--limit",
    "8",
]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE"):
        env.pop(name, None)
    return patience.run([sys.executable, *command], env=env, cwd=cwd)


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`pa-fast` with these arguments on two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return run(*launcher, "-m", "pa_fast", *arguments, cwd=cwd)


def started(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `torchrun` returns, by two ranks that are started quickly."""
    ranks = programs.ranks(2, programs.run_pa_fast, *arguments, folder=cwd)
    said = [patience.communicate(rank) for rank in ranks]
    code = max(abs(rank.returncode or 0) for rank in ranks)
    return subprocess.CompletedProcess(arguments, code, *map("".join, zip(*said)))


def called(*arguments: str) -> int:
    """The exit code of `pa-fast` with these arguments, in this process, on one core."""
    with pytest.MonkeyPatch.context() as patch, one_core():
        for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "argv", ["pa-fast", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert called(*SWEEP, "--out", str(out)) == 0
    return out


def assert_same(out: Path, whole: Path) -> None:
    for name in ("results.csv", "results.json", "trajectory.svg"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_workers_on_ray_give_the_results_of_one_process(
    cluster: str, whole: Path, tmp_path: Path
) -> None:
    assert called(*SWEEP, "--out", str(tmp_path / "run"), "--workers", "2") == 0
    assert_same(tmp_path / "run", whole)


def test_what_ray_prints_is_not_among_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prints(*_: object, **__: object) -> None:
        print("(raylet) A worker died")

    monkeypatch.setattr("pa_fast.launch.ray.sweep", prints)
    assert called(*SWEEP, "--out", str(tmp_path / "run"), "--workers", "2") == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "A worker died" in shown.err


def test_shards_give_the_results_of_one_process(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert called(*SWEEP, "--out", str(tmp_path / "run"), "--shard", "auto") == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_shards_under_torchrun_give_the_results_of_one_process(whole: Path, tmp_path: Path) -> None:
    done = torchrun(*SWEEP, "--out", "run", "--shard", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", whole)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--workers", "2", "--shard", "0/2"], "--workers and --shard together"),
        (["--workers", "2", "--device", "cuda:1"], "device `cuda:1` for 2 workers"),
        (["--shard", "2/2"], "shard 2/2 does not exist"),
        (["--shard", "auto"], "nothing in the environment says"),
        (["--shard", "0/2", "--overwrite"], "overwrite and shard together"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    options: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*SWEEP, "--out", str(tmp_path / "run"), *options) == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("launched", [started, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_ranks_that_hold_one_model_write_one_run(
    launched: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sides = write_pair(tmp_path, "llama", vocab_size=64, max_position_embeddings=256)
    for side in sides:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "pair" / "base" / name, side / name)
    pair = [str(side) for side in sides]
    sweep = [
        "sweep",
        *pair,
        "--lambdas",
        "0,1/3",
        "--eval",
        f"perplexity:{DEMO / 'README.md'},window=128",
        "--out",
    ]
    done = launched(*sweep, "split", "--engine", "tensor-parallel", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("effective λ") == 1, "one rank tells"
    assert called(*sweep, str(tmp_path / "whole")) == 0
    rows = [
        json.loads((tmp_path / out / "results.json").read_text())["rows"]
        for out in ("split", "whole")
    ]
    assert [row["lambda"] for row in rows[0]] == ["0", "1/3"]
    assert [row["score"] for row in rows[0]] == pytest.approx(
        [row["score"] for row in rows[1]], rel=0.01
    )  # sums of bf16 are split
    assert [row["effective_lambda"] for row in rows[0]] == pytest.approx(
        [row["effective_lambda"] for row in rows[1]], abs=1e-5
    )
    for options, why in (
        ([], "no launcher has started this process"),
        (["--workers", "2"], "its ranks are one worker"),
    ):
        assert called(*sweep, str(tmp_path / "other"), "--engine", "tensor-parallel", *options)
        refused = capsys.readouterr().err
        assert why in refused and "Traceback" not in refused


def test_λ_that_the_store_is_not_for_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever runs a sweep, for every engine: vLLM would take its time to start first."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(pa_fast.run, "engine", load)
    for engine in pa_fast.run.ENGINES:
        job = pa_fast.run.SweepSpec(
            "base", "instruct", "0,1.5", (SWEEP[6],), str(tmp_path), store="packed", engine=engine
        )
        for way in (
            pa_fast.run.run,
            lockstep.run,
            lambda job: ray.run(job, 2),
            lambda job: list(pa_fast.run.run_points(job, [0, 1.5])),
        ):
            with pytest.raises(UsageError, match=r"λ = 1.5 is outside \[0, 1\]") as raised:
                way(job)
            assert "use the dense store" in str(raised.value.hint)
    with pytest.raises(AssertionError, match="a model was loaded"):
        pa_fast.run.run(dataclasses.replace(job, lambdas="0,1"))

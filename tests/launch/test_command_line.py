"""The same sweep from the command line in one process, on Ray, and under torchrun: the same results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import patience
from tests.engines.architectures import write_pair

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
SWEEP = [
    "sweep", str(DEMO / "pair" / "base"), str(DEMO / "pair" / "instruct"), "--lambdas", "0:1:0.5",
    "--eval", f"icl:{DEMO / 'fewshot.jsonl'},shots=1,sep=\\n", "--limit", "8",
]  # fmt: skip


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE"):
        env.pop(name, None)
    return patience.run([sys.executable, *command], env=env, cwd=cwd)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = run("-m", "pa_fast", *SWEEP, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["-m", "pa_fast"], ["--workers", "2"]),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pa_fast"], ["--shard", "auto"]),
    ],
    ids=["ray", "torchrun"],
)
def test_the_results_are_those_of_one_process(before: list[str], after: list[str], whole: Path, tmp_path: Path) -> None:
    if "--workers" in after:
        pytest.importorskip("ray")
    done = run(*before, *SWEEP, "--out", "run", *after, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("results.csv", "results.json", "trajectory.svg"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
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
def test_what_does_not_go_together_is_wrong_usage(options: list[str], why: str, tmp_path: Path) -> None:
    done = run("-m", "pa_fast", *SWEEP, "--out", "run", *options, cwd=tmp_path)
    assert (done.returncode, why in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_ranks_that_hold_one_model_write_one_run(tmp_path: Path) -> None:
    sides = write_pair(tmp_path, "llama", vocab_size=64, max_position_embeddings=256)
    for side in sides:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "pair" / "base" / name, side / name)
    pair = [str(side) for side in sides]
    sweep = ["sweep", *pair, "--lambdas", "0,1/3", "--eval", f"perplexity:{DEMO / 'README.md'},window=128", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pa_fast"]
    done = run(*torchrun, *sweep, "split", "--engine", "tensor-parallel", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("effective λ") == 1, "one rank tells"
    whole = run("-m", "pa_fast", *sweep, "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    rows = [json.loads((tmp_path / out / "results.json").read_text())["rows"] for out in ("split", "whole")]
    assert [row["lambda"] for row in rows[0]] == ["0", "1/3"]
    assert [row["score"] for row in rows[0]] == pytest.approx(
        [row["score"] for row in rows[1]], rel=0.01
    )  # sums of bf16 are split
    assert [row["effective_lambda"] for row in rows[0]] == pytest.approx([row["effective_lambda"] for row in rows[1]], abs=1e-5)
    for options, why in (([], "no launcher has started this process"), (["--workers", "2"], "its ranks are one worker")):
        refused = run("-m", "pa_fast", *sweep, "other", "--engine", "tensor-parallel", *options, cwd=tmp_path)
        assert refused.returncode and why in refused.stderr and "Traceback" not in refused.stderr

"""The tensor-parallel engine on real gloo ranks: one launch per number of ranks, one test per check
in `on_ranks.py`."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys

import pytest

import pa_fast
from pa_fast.engines.tensor_parallel import load
from pa_fast.errors import EngineError, UsageError
from tests import patience, programs
from tests.engines import on_ranks
from tests.engines.on_ranks import CHECKS, ON_TWO_RANKS

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def launched(world: int, folder: pathlib.Path) -> dict[str, str]:
    """What came of each check on `world` ranks: nothing, or the tracebacks; and what the launch
    printed."""
    try:
        said = started(world, folder) if world == 2 else torchrun(world, folder)
    except patience.Stalled as stalled:
        said = str(stalled)
    results = folder / "results.json"
    found: dict[str, str] = json.loads(results.read_text()) if results.exists() else {}
    return {**found, "launch": said}


def started(world: int, folder: pathlib.Path) -> str:
    """What ranks print that are started with the environment that torchrun gives them."""
    ranks = programs.ranks(world, on_ranks.main, folder, folder=folder)
    return "".join(patience.communicate(rank)[1] for rank in ranks)


def torchrun(world: int, folder: pathlib.Path) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return patience.run(
        [sys.executable, *launcher, "-m", "tests.engines.on_ranks", str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        },
    ).stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, pathlib.Path]:
    return {world: tmp_path_factory.mktemp(f"world-{world}") for world in (2, 4)}


@pytest.mark.parametrize(
    ("world", "check"),
    [
        *((2, name) for name in ON_TWO_RANKS),
        *(pytest.param(4, name, marks=pytest.mark.slow) for name in CHECKS),
    ],
    ids=lambda value: str(value),
)
def test_on_ranks(world: int, check: str, folders: dict[int, pathlib.Path]) -> None:
    results = launched(world, folders[world])
    assert check in results, f"the ranks ended before this check:\n{results['launch'][-8000:]}"
    assert not results[check], results[check]


def test_without_a_launcher_there_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EngineError, match="no launcher"):
        load("base", "instruct")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(EngineError, match="single rank"):
        load("base", "instruct")
    with pytest.raises(UsageError, match="device `tpu`"):
        load("base", "instruct", device="tpu")


def test_effective_lambda_is_the_quotient_of_its_projection() -> None:
    import torch

    base = {"a": torch.zeros(4), "b": torch.zeros(2)}
    instruct = {"a": torch.ones(4), "b": torch.full((2,), 3.0)}
    weights = pa_fast.LiveWeights.bind(
        {name: torch.empty_like(tensor) for name, tensor in base.items()}, base, instruct
    )
    weights.set_lambda(0.5)
    assert weights.projection() == (2.0 + 9.0, 4.0 + 18.0)
    assert weights.projection({"b"}) == (9.0, 18.0)
    assert weights.effective_lambda() == 0.5

"""Pairs of several architectures, and answers of unmodified vLLM on their merges."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.vllm import pairs

ROOT = pathlib.Path(__file__).parents[2]
FOUND = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if FOUND else ["test_*.py"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
if FOUND:
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "seed": 0,
    "disable_log_stats": True,
}
"""Arguments of every engine: the floats of two engines are equal under equal ones."""


@pytest.fixture(autouse=True)
def poisoned_empty() -> None:
    """vLLM reads memory that it allocates uninitialised."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="session")
def pair(folders: pathlib.Path) -> tuple[str, str]:
    """An untied Llama pair."""
    return pairs.made(folders, "llama")


def processes(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.vllm.…` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=500,
    )


Fresh = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Answers of unmodified engines: folders → name → answers, from one process in which pa_fast
    is never imported."""

    def answers(jobs: dict[str, str], options: dict[str, Any] | None = None, **env: str) -> Any:
        out = tmp_path_factory.mktemp("fresh") / "answers.json"
        asked = json.dumps({"jobs": jobs, "options": {**OPTIONS, **(options or {})}})
        done = processes("tests.vllm.fresh", asked, str(out), **env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text())

    return answers


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """`pa_fast.vllm.load` with OPTIONS, one engine at a time, shut down afterwards."""
    import pa_fast.vllm

    started: list[Any] = []

    def load(base: str, instruct: str, **options: Any) -> Any:
        started.append(pa_fast.vllm.load(base, instruct, **{**OPTIONS, **options}))
        return started[-1]

    yield load
    for one in started:
        one.close()
    clean_up()


def clean_up() -> None:
    """Leave the process as it was before an engine was started in it."""
    import gc

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()

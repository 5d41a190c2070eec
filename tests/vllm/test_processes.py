"""Engines of several processes, and compiled ones: as in one process."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
from tests.vllm import pairs
from tests.vllm.conftest import OPTIONS, processes

LAMBDAS = ["0", "0.3", "1", "0.3"]
MODES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "two ranks": (
        "llama-heads",
        {"tensor_parallel_size": 2},
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    ),
    "own process": ("llama", {}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    "compiled": ("llama", {"enforce_eager": False}, {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_fresh_engines(
    mode: str, folders: pathlib.Path, fresh: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    name, options, environment = MODES[mode]
    pair = pairs.made(folders, name)
    jobs = {}
    for lam in ("0.3", "1"):
        jobs[lam] = str(tmp_path / lam)
        pa_fast.merge(*pair, lam, jobs[lam])
    asked = {
        "pair": pair,
        "options": {**OPTIONS, **options},
        "lambdas": LAMBDAS,
        "kill": mode == "two ranks",
    }
    out = tmp_path / "swept.json"
    done = processes("tests.vllm.swept", json.dumps(asked), str(out), **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    expected = fresh(jobs, options, **environment)
    assert {lam: found[lam] for lam in jobs} == expected
    assert found["effective 0.3"] == pytest.approx(0.3, abs=0.02)
    if mode == "two ranks":
        assert "start the engine again" in found["killed"] and found["lam"] is None

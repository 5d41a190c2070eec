"""SIGKILL at random moments: the same results, and no finished point twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from pa_fast.base import Lambda
from pa_fast.sweep import journal, sweep
from tests.sweep.fakes import FakeEngine
from tests.sweep.killable import LAMBDAS, evaluators

ROOT = Path(__file__).parents[2]
KILLS = 24


def start(out: Path, log: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "tests.sweep.killable", str(out), str(log)]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(out: Path) -> list[tuple[float, str]]:
    if not (out / journal.NAME).exists():
        return []
    return [
        (float(Lambda(entry.lam)), entry.evaluator) for entry in journal.read(out) if entry.finished
    ]


def evaluated(log: Path) -> list[tuple[float, str]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(float(lam), name) for lam, _, name in (line.partition(" ") for line in lines)]


def test_killed_at_random_moments_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    whole, out, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    undisturbed = sweep(FakeEngine(), LAMBDAS, evaluators(None, 0), whole, figure=False)
    assert len(undisturbed.rows) == 242
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    kills_at: list[int] = []
    for attempt in range(KILLS):
        before, seen = set(finished(out)), len(evaluated(log))
        process = start(out, log)
        if attempt % 4:  # most in the loop, some while the folder is being set up
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.03))
        else:
            time.sleep(chance.uniform(0.02, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -9, f"seed {seed}: the sweep ended before kill {attempt}"
        assert not before & set(evaluated(log)[seen:]), f"seed {seed}: a finished point ran again"
        assert before <= set(finished(out)), f"seed {seed}: a finished point was lost"
        kills_at.append(len(finished(out)))
    before, seen = set(finished(out)), len(evaluated(log))
    process = start(out, log)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not before & set(evaluated(log)[seen:])
    assert len(finished(out)) == len(set(finished(out))) == 242
    assert len(set(kills_at)) >= 5, f"the kills fell on too few moments: {kills_at}"
    for name in ("results.csv", "results.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    items = {path.name: path.read_bytes() for path in (out / "items").iterdir()}
    assert items == {path.name: path.read_bytes() for path in (whole / "items").iterdir()}
    assert len(items) == 242

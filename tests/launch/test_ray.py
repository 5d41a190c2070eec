"""Workers on Ray: the results of one process, whoever is killed in the middle."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.base import Lambda
from pa_fast.errors import EngineError, MissingExtra, RunError, UsageError
from pa_fast.launch import ray as launcher
from pa_fast.sweep import journal
from tests import patience
from tests.launch import made
from tests.programs import Program
from tests.sweep import planted
from tests.sweep.fakes import FakeEngine

ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
LAMBDAS = "0:1:0.05"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The run folder of one process."""
    pa_fast.sweep(FakeEngine(), LAMBDAS, made.scorers(), tmp_path / "whole", figure=False)
    return tmp_path / "whole"


def assert_same(out: Path, whole: Path) -> None:
    for name in ("results.csv", "results.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    items = {path.name: path.read_bytes() for path in (out / "items").iterdir()}
    assert items == {path.name: path.read_bytes() for path in (whole / "items").iterdir()}


def points(out: Path) -> list[tuple[str, str]]:
    return [(entry.lam, entry.evaluator) for entry in journal.read(out) if entry.finished]


@pytest.mark.slow
def test_ten_killed_workers_lose_nothing_and_repeat_no_finished_point(
    tmp_path: Path, whole: Path, cluster: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    seed = random.randrange(2**32)
    killed: list[int] = []

    def killer() -> None:
        chance = random.Random(seed)
        while len(killed) < 10:
            time.sleep(chance.uniform(0.02, 0.4))
            alive = (
                {int(line.split()[2]) for line in log.read_text().splitlines()}
                if log.exists()
                else set()
            )
            alive -= set(killed)
            if alive:
                killed.append(chance.choice(sorted(alive)))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    launcher.sweep(functools.partial(made.steady, log, 0.25), LAMBDAS, out, 2, figure=False)
    thread.join(10)
    assert len(set(killed)) == 10, f"seed {seed}: the sweep ended before ten kills"
    done = points(out)
    assert len(done) == len(set(done)) == 42, f"seed {seed}"
    assert_same(out, whole)
    started = [tuple(line.split()[:2]) for line in log.read_text().splitlines()]
    assert len(started) <= 42 + 10, f"seed {seed}: a kill cost more than the running point"


def test_a_killed_driver_loses_nothing(tmp_path: Path, whole: Path, cluster: str) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = Program(
        made.main,
        str(out),
        str(log),
        "0.1",
        folder=tmp_path,
        environment={"RAY_ADDRESS": cluster},
    )
    deadline = time.monotonic() + 60
    while len(points(out) if (out / journal.NAME).exists() else []) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = points(out)
    assert 8 <= len(before) < 42
    workers = {int(line.split()[2]) for line in log.read_text().splitlines()}
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline + 30, "the workers outlived their driver"
        time.sleep(0.1)
    log.unlink()
    launcher.sweep(functools.partial(made.steady, log), LAMBDAS, out, 2, figure=False)
    ran = {
        (Lambda(lam).key, name)
        for lam, name, _ in (line.split() for line in log.read_text().splitlines())
    }
    assert not ran & set(before), "a finished point ran again"
    assert len(points(out)) == len(set(points(out))) == 42
    assert_same(out, whole)


def test_a_point_that_kills_its_workers_fails_alone(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "MOST_DEATHS", 2)
    log = tmp_path / "log"
    result = launcher.sweep(
        functools.partial(made.deadly, 0.5, log), "0:1:0.5", tmp_path / "out", 2, figure=False
    )
    assert [(failure.lam.key, failure.evaluator) for failure in result.failures] == [("0.5", "icl")]
    assert "2 workers died at this point" in result.failures[0].error
    assert len(result.rows) == 5
    assert log.read_text().splitlines().count("0.5") == 2


def test_errors_of_workers_arrive_as_they_were_raised(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "MOST_DEATHS", 2)
    with pytest.raises(EngineError) as caught:
        launcher.sweep(made.refusing, "0,1", tmp_path / "out", 1)
    assert (caught.value.message, caught.value.hint) == ("no such pair", "look for it")
    with pytest.raises(EngineError, match="2 workers died while they loaded the pair"):
        launcher.sweep(made.stillborn, "0,1", tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_workers_that_would_run_different_sweeps_are_refused(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(RunError, match=r"engine\.base: recorded"):
        launcher.sweep(
            functools.partial(made.different, tmp_path / "log"),
            "0:1:0.01",
            tmp_path / "out",
            2,
            figure=False,
        )


def test_a_worker_that_never_loads_is_not_waited_for(
    tmp_path: Path, cluster: str, whole: Path
) -> None:
    done = threading.Event()

    def run() -> None:
        launcher.sweep(
            functools.partial(made.endless, tmp_path / "log"),
            LAMBDAS,
            tmp_path / "out",
            2,
            figure=False,
        )
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(120)
    assert_same(tmp_path / "out", whole)


def test_what_a_cluster_cannot_hold_is_refused(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="3 workers on a Ray cluster of 2 cores"):
        launcher.sweep(made.steady, "0:1:0.1", tmp_path / "out", 3)
    with pytest.raises(UsageError, match="1 workers on a Ray cluster of 2 cores and 0 GPUs"):
        launcher.sweep(made.steady, "0,1", tmp_path / "out", 1, gpus=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="Ray, which is not installed"):
        launcher.sweep(made.steady, "0,1", tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "cores"),
    [
        ([(8, 0)], 2, 0, 4),
        ([(8, 0), (8, 0)], 3, 0, 4),  # 5 each would leave the third without a place
        ([(64, 8)], 8, 1, 8),
        ([(64, 1), (4, 1)], 2, 1, 4),
        ([(2, 0)], 3, 0, None),
        ([(64, 1)], 2, 1, None),
    ],
)
def test_workers_share_the_cores(
    nodes: list[tuple[int, int]], workers: int, gpus: int, cores: int | None
) -> None:
    class Cluster:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            dead = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
            return [
                dead,
                *(
                    {"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}}
                    for c, g in nodes
                ),
            ]

    if cores is None:
        with pytest.raises(UsageError):
            launcher.cores_per_worker(Cluster, workers, gpus)
    else:
        assert launcher.cores_per_worker(Cluster, workers, gpus) == cores


DOOMED = """
import os, signal, subprocess, sys, threading, time, functools, pathlib
from tests.launch import made
from tests.sweep import planted
from pa_fast.errors import EngineError
from pa_fast.launch import ray

def kill(log):
    while not log.exists():
        time.sleep(0.05)
    listed = subprocess.run(["ps", "-eo", "pid,ppid,comm"], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        pid, parent, name = line.split()[:3]
        if name == "raylet" and int(parent) == os.getpid():
            os.kill(int(pid), signal.SIGKILL)

out = pathlib.Path(sys.argv[1])
threading.Thread(target=kill, args=(out / "log",), daemon=True).start()
try:
    make = functools.partial(made.steady, out / "log", 5.0)
    result = ray.sweep(make, "0:1:0.05", out / "run", 2, figure=False)
    print("ended with", len(result.rows), "scores")
except EngineError as error:
    print("refused:", error.message)
"""


@pytest.mark.slow
def test_a_killed_agent_ends_the_sweep_with_a_message(tmp_path: Path) -> None:
    """Ray itself needs about 20 s to find that its agent is dead, and waits for ever afterwards.
    Workers that live on score meanwhile: a sweep shorter than that ends as it should."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", DOOMED, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "refused: Ray's agent on this machine (raylet) has died" in done.stdout, (
        done.stdout + done.stderr
    )


def test_a_dead_agent_is_found_while_nothing_is_ready() -> None:
    class Dead:
        """Ray as it is after its agent died: nothing is ever ready."""

        waits = 0

        def wait(
            self, busy: list[Any], num_returns: int, timeout: float | None = None
        ) -> tuple[list[Any], list[Any]]:
            assert timeout, "waits for ever"
            self.waits += 1
            return [], busy

        def nodes(self) -> list[dict[str, Any]]:
            return [
                {"NodeID": "mine", "Alive": self.waits < 3},
                {"NodeID": "another", "Alive": True},
            ]

    ray = Dead()
    with pytest.raises(EngineError, match="agent on this machine"):
        launcher.first_ready(ray, "mine", ["busy"], loading=True)
    assert ray.waits == 3


def test_a_ray_that_does_not_start_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        EngineError, match="Ray cannot be started on this machine: The current node timed out"
    ):
        launcher.sweep(made.steady, "0,1", tmp_path / "out", 1)


def test_an_adaptive_schedule_is_that_of_one_process(tmp_path: Path, cluster: str) -> None:
    planted.run(tmp_path / "whole")
    launcher.sweep(planted.made, planted.SCHEDULE, tmp_path / "out", 2, figure=False)
    assert_same(tmp_path / "out", tmp_path / "whole")
    tried = points(tmp_path / "out")
    assert len(tried) == len(set(tried)) == 2 * len(journal_lambdas(tmp_path / "whole"))
    # all is finished: the schedule is found again from the scores, and no point runs
    launcher.sweep(planted.made, planted.SCHEDULE, tmp_path / "out", 1, figure=False)
    assert points(tmp_path / "out") == tried


@pytest.mark.slow
def test_a_storm_of_kills_leaves_the_adaptive_sweep_of_one_process(tmp_path: Path) -> None:
    """One kill in five hits the driver, with all that it started; the others hit a worker in the
    middle of an evaluation."""
    planted.run(tmp_path / "whole")
    out, log, chance = tmp_path / "out", tmp_path / "log", random.Random(0)
    log.touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env.pop("RAY_ADDRESS", None)
    pause_s, wanted = 0.5, int(os.environ.get("PA_FAST_KILLS", 50))

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.launch.made", str(out), str(log), str(pause_s)]
        return subprocess.Popen(
            [*command, "auto"],
            env=env,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def begun() -> list[int]:
        return [int(line.split()[2]) for line in log.read_text().splitlines()]

    driver, drivers, workers = start(), 0, 0
    while drivers + workers < wanted:
        seen, watch = len(begun()), patience.Watch(driver.pid)
        while len(begun()) == seen and driver.poll() is None:
            assert watch.stalled() is None
            time.sleep(0.01)
        if driver.poll() is not None:  # at points that failed, as five workers died there
            assert driver.returncode == 1, "the sweep ended before all kills"
            driver = start()
            continue
        time.sleep(chance.uniform(0, pause_s))
        if chance.random() < 0.2:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            drivers, driver = drivers + 1, start()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(begun()[-1], signal.SIGKILL)
                workers += 1
    attempts = 0
    while patience.communicate(driver) and driver.returncode:
        attempts, driver = attempts + 1, start()
        assert attempts < 3, "points go on failing"
    assert_same(out, tmp_path / "whole")
    done = points(out)
    assert len(done) == len(set(done)) == 2 * len(journal_lambdas(tmp_path / "whole"))
    # a kill costs the running point; one of a driver those of both workers, and those that they
    # begin before they notice
    assert len(begun()) <= len(done) + workers + 4 * drivers
    print(f"{workers} workers and {drivers} drivers killed, {len(begun())} evaluations begun")


def journal_lambdas(out: Path) -> set[str]:
    return {entry.lam for entry in journal.read(out)}

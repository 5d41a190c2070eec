"""Whatever an evaluator leaves in the process: no other score changes by it, and it is named
once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from pa_fast.base import Engine, Score
from pa_fast.errors import RunError
from pa_fast.sweep import journal, sweep
from pa_fast.sweep.journal import Journal
from pa_fast.sweep.process import Restored
from tests.sweep.fakes import FakeEngine, Scorer
from tests.sweep.test_driver import Told
from tests.sweep.test_kills import ROOT

kept: list[Any] = []


def enter(context: Any) -> None:
    """Enter `context` and never leave it."""
    kept.append(context)
    context.__enter__()


@pytest.fixture(autouse=True)
def no_hooks() -> Iterator[None]:
    """A flop counter that was never left has had its mode put back; the hooks that it has on every
    module go, too."""
    yield
    for context in kept:
        if (tracker := getattr(context, "mod_tracker", None)) is not None:
            tracker.__exit__(None, None, None)
            del context.mod_tracker


def assign(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


LEAKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "autocast": ("autocast", lambda: enter(torch.autocast("cpu", dtype=torch.float16))),
    "autocast without a cache": ("autocast", lambda: torch.set_autocast_cache_enabled(False)),
    "default dtype": ("default dtype", lambda: torch.set_default_dtype(torch.float64)),
    "default device": ("default device", lambda: torch.set_default_device("meta")),
    "an open device": ("default device", lambda: torch.device("meta").__enter__()),
    "an open mode": ("torch modes", lambda: enter(flop_counter())),
    "matmul precision": ("matmul precision", lambda: torch.set_float32_matmul_precision("medium")),
    "matmul precision, the newer way": (
        "matmul precision",
        lambda: assign(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ),
    "TF32 of cuDNN": (
        "matmul precision",
        lambda: assign(torch.backends.cudnn, "allow_tf32", False),
    ),
    "cuDNN": ("cuDNN", lambda: assign(torch.backends.cudnn, "benchmark", True)),
    "oneDNN": ("oneDNN", lambda: assign(torch.backends.mkldnn, "enabled", False)),
    "attention": ("attention kernels", lambda: torch.backends.cuda.enable_math_sdp(False)),
    "deterministic algorithms": (
        "deterministic algorithms",
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "threads": ("threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "subnormal numbers": ("subnormal numbers", lambda: torch.set_flush_denormal(True)),
    "gradient mode": ("gradient mode", lambda: torch.set_grad_enabled(not torch.is_grad_enabled())),
    "inference mode": ("inference mode", lambda: enter(torch.inference_mode())),
    "random state of torch": ("random state", lambda: torch.manual_seed(3)),
    "random state of NumPy": ("random state", lambda: numpy.random.seed(3)),
    "random state of Python": ("random state", lambda: random.seed(3)),
    "error handling of NumPy": ("NumPy's error handling", lambda: numpy.seterr(all="ignore")),
    "working directory": ("working directory", lambda: os.chdir("/")),
    "recursion limit": (
        "recursion limit",
        lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 7),
    ),
    "warnings as errors": ("warnings as errors", lambda: warnings.simplefilter("error")),
    "anomaly detection": ("anomaly detection", lambda: torch.autograd.set_detect_anomaly(True)),
    "interrupts": ("signal handler", lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)),
}


def snapshot() -> dict[str, Any]:
    """What a score can depend on, read by other means than those under test where there are any."""
    sums = torch.ones(3) @ torch.ones(3)
    return {
        "folder": os.getcwd(),
        "draws": (
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ),
        "made": (
            str(sums.dtype),
            str(sums.device),
            sums.is_inference(),
            torch.ones(1, requires_grad=True).mul(2).requires_grad,
        ),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "threads": torch.get_num_threads(),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "flags": (
            torch.backends.cudnn.benchmark,
            torch.backends.mkldnn.enabled,
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "subnormal": sys.float_info.min / 4,
        "numpy": numpy.geterr(),
        "recursion": sys.getrecursionlimit(),
        "warnings": [filter_ for filter_ in warnings.filters if filter_[0] == "error"],
        "anomalies": torch.is_anomaly_enabled(),
        "interrupt": signal.getsignal(signal.SIGINT),
    }


@pytest.mark.parametrize("leak", LEAKS)
def test_what_an_evaluator_leaves_is_put_back_and_named_once(tmp_path: Path, leak: str) -> None:
    kind, act = LEAKS[leak]
    if "newer" in leak and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this version of PyTorch has the older way alone")
    before, seen = snapshot(), []
    leaky, watcher = (
        Scorer("leaky", act=lambda _: act()),
        Scorer("watcher", act=lambda _: seen.append(snapshot())),
    )
    told = Told()
    with Restored("the test"):  # nothing leaks into other tests where the mend fails
        sweep(FakeEngine(), "0,0.5,1", [leaky, watcher], tmp_path, figure=False, progress=told)
        assert seen == [before] * 3 and snapshot() == before
    notes = [what[1] for what in told.told if what[0] == "noted"]
    assert len(notes) == 1 and f"evaluator `leaky` changes the {kind}" in notes[0]
    entries = {(entry.lam, entry.evaluator): entry.restored for entry in journal.read(tmp_path)}
    assert all(
        kind in (entries[lam, "leaky"] or ()) and entries[lam, "watcher"] is None
        for lam in ("0", "0.5", "1")
    )
    assert (
        kind not in (tmp_path / "results.json").read_text() + (tmp_path / "results.csv").read_text()
    )


def test_it_is_put_back_whatever_the_evaluator_raises(tmp_path: Path) -> None:
    def act(error: BaseException) -> None:
        os.chdir("/")
        raise error

    before = os.getcwd()
    failing = Scorer("failing", act=lambda _: act(ValueError("no")))
    result = sweep(FakeEngine(), "0", [failing], tmp_path / "a", figure=False)
    assert "ValueError: no" in result.failures[0].error and os.getcwd() == before
    with pytest.raises(KeyboardInterrupt):
        sweep(
            FakeEngine(),
            "0",
            [Scorer("stopped", act=lambda _: act(KeyboardInterrupt()))],
            tmp_path / "b",
            figure=False,
        )
    assert os.getcwd() == before


def test_an_added_evaluator_that_draws_changes_no_other_score(tmp_path: Path) -> None:
    class Sampling(Scorer):
        def __call__(self, engine: Engine) -> Score:
            return Score(
                random.random() + float(torch.rand(())) + float(numpy.random.rand()), "points", 1
            )

    def scores(out: Path, names: str, points: str) -> list[float]:
        with Restored("the test"):
            random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
            result = sweep(
                FakeEngine(), points, [Sampling(name) for name in names], out, figure=False
            )
        return [row.score for row in result.rows if row.evaluator == "b"]

    alone = scores(tmp_path / "alone", "b", "0,0.5,1")
    assert scores(tmp_path / "both", "ab", "0,0.5,1") == alone
    assert len(set(alone)) == 1, "each λ is scored on the same draws"


def test_casts_that_autocast_keeps_do_not_outlive_their_weights() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (1.0, 2.0):
            with torch.no_grad():
                weight.fill_(value)
            with Restored("an evaluator"):
                assert float((torch.ones(1, 4) @ weight)[0, 0].detach()) == 4 * value


def test_what_cannot_be_put_back_ends_the_sweep_and_keeps_its_points(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()

    def act(engine: Engine) -> None:
        if engine.weights.lam == 0.5:
            os.chdir("/")
            (tmp_path / "here").rmdir()

    before = os.getcwd()
    os.chdir(tmp_path / "here")
    try:
        with pytest.raises(
            RunError, match="evaluator `mover` changed what cannot be put back: working directory"
        ):
            sweep(
                FakeEngine(), "0,0.5,1", [Scorer("mover", act=act)], tmp_path / "out", figure=False
            )
    finally:
        os.chdir(before)
    assert [entry.lam for entry in journal.read(tmp_path / "out")] == ["0"]


def test_a_relative_run_folder_stays_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    mover = Scorer("mover", act=lambda _: os.chdir(tmp_path / "other"))
    result = sweep(FakeEngine(), "0,1", [mover], "out", figure=False)
    assert result.out == tmp_path / "out" and len(result.rows) == 2
    assert {path.name for path in (tmp_path / "other").iterdir()} == set()


def test_a_child_that_outlives_the_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    children: list[int] = []

    running, is_running = os.pipe()

    def act(_: Engine) -> None:
        child = os.fork()
        if child == 0:
            os.write(is_running, b".")
            time.sleep(60)
            os._exit(0)
        children.append(child)

    sweep(FakeEngine(), "0", [Scorer("forking", act=act)], tmp_path, figure=False)
    os.read(running, 1)  # on a busy machine the child may not have begun
    try:
        assert os.waitpid(children[0], os.WNOHANG) == (
            0,
            0,
        ), "the child is gone: this test shows nothing"
        with Journal(tmp_path):
            pass
        sweep(FakeEngine(), "0,1", [Scorer("forking")], tmp_path, figure=False)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


@pytest.mark.parametrize("way", ["return", "raise", "exit"])
def test_a_child_that_comes_back_into_the_sweep_ends_there(tmp_path: Path, way: str) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pa_fast.sweep import sweep\nfrom"
        " tests.sweep.fakes import FakeEngine, Scorer\ndef act(_):\n    child = os.fork()\n    if"
        " child: os.waitpid(child, 0)\n    elif sys.argv[2] == 'raise': raise KeyboardInterrupt\n  "
        "  elif sys.argv[2] == 'exit': sys.exit(0)\nsweep(FakeEngine(), '0:1:0.25',"
        " [Scorer('forking', act=act)], Path(sys.argv[1]), figure=False)\nprint('end')"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), way],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert done.stderr.count("forked a child that did not exit") == 5
    assert [entry.lam for entry in journal.read(tmp_path / "out")] == [
        "0",
        "0.25",
        "0.5",
        "0.75",
        "1",
    ]

"""Processes of their own that start in milliseconds: forked from a server that has imported what
takes seconds, and has done nothing else."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "numpy.random",
        "scipy.stats",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.tensor.parallel",
        "fontTools.subset",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_pdf",
        "matplotlib.backends.backend_svg",
        "pydantic",
        "typer",
        "pa_fast.checkpoint.merge",
        "pa_fast.cli.runs",
        "pa_fast.engines.transformers",
        "pa_fast.report.contents",
        "pa_fast.run",
        "pa_fast.sweep.report",
    ]
)

_NUMBERS = itertools.count()


class Program:
    """`call(*args)` in a process of its own, with the part of `subprocess.Popen` that tests need.

    What is read while torch is imported, such as OMP_NUM_THREADS, is that of the first program.

    Args:
        call: a function of a module.
        folder: where its output is kept; the process works there.
        environment: changes to that of this process.
    """

    def __init__(
        self,
        call: Callable[..., object],
        *args: Any,
        folder: pathlib.Path,
        environment: Mapping[str, str] = {},
    ):
        self.args = (call.__qualname__, *args)
        number = next(_NUMBERS)
        self._printed = [folder / f"program-{number}.{name}" for name in ("out", "err")]
        self._process = SERVER.Process(
            target=_serve,
            args=(call, args, folder, {**os.environ, **environment}, self._printed),
            daemon=True,
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed to standard output and standard error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([*map(str, self.args)], timeout or 0)
        out, errors = (path.read_text(encoding="utf-8") for path in self._printed)
        return out, errors


def pa_fast(*arguments: str, folder: pathlib.Path, environment: Mapping[str, str] = {}) -> Program:
    """`pa-fast ARGUMENTS…`, run in `folder`."""
    return Program(run_pa_fast, *arguments, folder=folder, environment=environment)


def ranks(
    world: int, call: Callable[..., object], *args: Any, folder: pathlib.Path
) -> list[Program]:
    """`call(*args)` on `world` ranks, each with the environment that torchrun would give it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Program(
            call,
            *args,
            folder=folder,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def run_pa_fast(*arguments: str) -> None:
    """`pa-fast ARGUMENTS…` in this process."""
    from pa_fast import cli

    sys.argv = ["pa-fast", *arguments]
    cli.main()


def _serve(
    call: Callable[..., object],
    args: tuple[Any, ...],
    folder: pathlib.Path,
    environment: Mapping[str, str],
    printed: list[pathlib.Path],
) -> None:
    gc.freeze()  # what was imported before is not looked through, and so not copied
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    call(*args)

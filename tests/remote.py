"""Conformance subjects whose weights live in other processes, and the ranks of a tensor-parallel
engine as one."""

from __future__ import annotations

import os
import pathlib
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch

import pa_fast
from pa_fast.engines.layout import local
from pa_fast.engines.tensor_parallel import load
from tests.engines.architectures import write_pair
from tests.engines.test_architectures import reload
from tests.patience import IDLE_S, LIMIT_S, Watch
from tests.programs import SERVER
from tests.subjects import Live, Subject


class Remote(Subject):
    """A subject whose every method is called in other processes. `ask` says how."""

    def ask(self, method: str, *args: Any) -> list[Any]:
        """The answers of all processes; raises what the first of them raised."""
        raise NotImplementedError

    def set_lambda(self, lam: float) -> None:
        self.ask("set_lambda", lam)

    def bits(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self.ask("bits")[0]
        return found

    def pointers(self) -> dict[str, int]:
        return self._by_process("pointers")

    def versions(self) -> dict[str, int]:
        return self._by_process("versions")

    def poke(self) -> str:
        return str(self.ask("poke")[0])

    def checksum(self) -> int:
        return self._same("checksum")

    def changed(self) -> list[str]:
        return self._same("changed")

    def verify(self) -> bool:
        return self._same("verify")

    def effective_lambda(self) -> float:
        return self._same("effective_lambda")

    def total_bytes(self) -> int:
        return sum(self.ask("total_bytes"))

    def __repr__(self) -> str:
        return str(self.ask("__repr__")[0])

    def _by_process(self, method: str) -> dict[str, int]:
        return {
            f"{name} in process {k}": value
            for k, found in enumerate(self.ask(method))
            for name, value in found.items()
        }

    def _same(self, method: str) -> Any:
        answers = self.ask(method)
        assert all(answer == answers[0] for answer in answers), (method, answers)
        return answers[0]


class Ranks(Remote):
    """`world` gloo ranks, started for a pair of `architecture` in `folder`."""

    def __init__(self, folder: pathlib.Path, architecture: str, world: int):
        folders = write_pair(folder, architecture)
        self.base, self.instruct = (reload(side) for side in folders)
        pipes = [SERVER.Pipe() for _ in range(world)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            SERVER.Process(
                target=_serve, args=(theirs, folders, folder / "store", rank, world), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes):
            process.start()
            theirs.close()
        self._answers()

    def ask(self, method: str, *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((method, args)))
        return self._answers()

    def _answers(self) -> list[Any]:
        found = []
        for rank, pipe in enumerate(self._pipes):
            watch = Watch(os.getpid())
            while not pipe.poll(1):
                assert (why := watch.stalled()) is None, f"rank {rank} does not answer: {why}"
            found.append(pickle.loads(pipe.recv_bytes()))
        for error, _ in found:
            if error is not None:
                raise error
        return [answer for _, answer in found]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(IDLE_S)


class Actor(Remote):
    """A Ray actor that holds a pair of `architecture` in `folder`, on a cluster of its own."""

    def __init__(self, folder: pathlib.Path, architecture: str):
        import ray

        folders = write_pair(folder, architecture)
        self.base, self.instruct = (reload(side) for side in folders)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        root = pathlib.Path(__file__).parents[1]
        env = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}}
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "include_dashboard": False,
        }
        ray.init(address="local", num_cpus=1, runtime_env=env, **quiet)
        self._ray, self._actor = ray, ray.remote(_Held).remote(*folders)

    def ask(self, method: str, *args: Any) -> list[Any]:
        error, answer = self._ray.get(self._actor.ask.remote(method, *args), timeout=LIMIT_S)
        if error is not None:
            raise error
        return [answer]

    def close(self) -> None:
        self._ray.shutdown()


class _Held:
    """What the actor of `Actor` runs."""

    def __init__(self, base: pathlib.Path, instruct: pathlib.Path):
        lm = pa_fast.load(base, instruct)
        self.subject = Live(lm.weights, lm.set_lambda, dict(lm.model.named_parameters()))

    def ask(self, method: str, *args: Any) -> tuple[Exception | None, Any]:
        try:
            return None, getattr(self.subject, method)(*args)
        except Exception as error:
            return error, None


class _Rank(Live):
    """What one rank answers: tensors put together for `bits`, else its own part of them. Rank 1 is
    the one that pokes."""

    def __init__(self, lm: Any):
        self.owners = dict(lm.model.named_parameters())
        super().__init__(
            lm.weights, lm.set_lambda, {name: local(tensor) for name, tensor in self.owners.items()}
        )

    def poke(self) -> str:
        name = next(reversed(self.live))
        return super().poke(name) if torch.distributed.get_rank() == 1 else name

    def bits(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {
                name: t.full_tensor() if hasattr(t, "full_tensor") else t.detach()
                for name, t in self.owners.items()
            }

    def pointers(self) -> dict[str, int]:
        return {name: local(tensor).data_ptr() for name, tensor in self.owners.items()}

    def versions(self) -> dict[str, int]:
        return {name: tensor._version for name, tensor in self.owners.items()}


def _serve(
    pipe: Connection,
    folders: tuple[pathlib.Path, pathlib.Path],
    store: pathlib.Path,
    rank: int,
    world: int,
) -> None:
    """Load the pair with the other ranks and answer until the pipe is closed."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    subject = _Rank(load(*folders))
    pipe.send_bytes(pickle.dumps((None, None)))
    while True:
        try:
            method, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (None, getattr(subject, method)(*args))
        except Exception as error:
            answer = (error, None)
        pipe.send_bytes(pickle.dumps(answer))

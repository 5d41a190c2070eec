"""Ranks: the processes that hold one model together, kept in step: all succeed, or all fail.

Each step is announced to all ranks before one of them enters the model, whose own collectives would
wait forever for a rank that took another path. Announcements have a process group of their own and
never mix with those of the model.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pa_fast.errors import EngineError, PaFastError, UsageError, first_line

T = TypeVar("T")

# Ranks may read files of many gigabytes at very different speeds.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class _Failure:
    kind: type[PaFastError]
    message: str
    hint: str | None


@dataclass(frozen=True)
class _Report:
    """The step that one rank is in, and its value or failure there."""

    step: str
    value: Any = None
    failure: _Failure | None = None


class Alone:
    """One process that holds a whole model, and waits for no other."""

    rank, world = 0, 1

    def sharding(self) -> dict[str, Any]:
        return {}

    def step(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def gather(self, name: str, work: Callable[[], T]) -> list[T]:
        return [work()]


ALONE = Alone()


class Ranks:
    """`world` processes, of which this is `rank`. Make one with `Ranks.join`; all methods are
    called by every rank.

    Attributes:
        rank, world: as the launcher counts, from 0.
        device: where this rank's shards live: `cpu`, or `cuda:` and its number on this host.
    """

    def __init__(self, rank: int, world: int, device: str, group: Any):
        self.rank, self.world, self.device = rank, world, device
        self._group = group

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """Join the ranks that torchrun, or a launcher that sets the same variables, has started.

        Args:
            device: `cpu`, `cuda` (each rank takes the GPU of its local number), or `auto`.

        Raises:
            UsageError: another device.
            EngineError: no launcher, a single rank, no GPU for this rank, or the others cannot be
                reached.
        """
        import torch
        import torch.distributed as dist

        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"device `{device}` for a rank",
                "write cpu or cuda: each rank takes the GPU of its local number",
            )
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if (
            not (dist.is_initialized() or "WORLD_SIZE" in os.environ)
            or "LOCAL_RANK" not in os.environ
        ):
            raise EngineError(
                "no launcher has started this process: RANK, WORLD_SIZE and LOCAL_RANK are not set",
                "start all ranks with torchrun --nproc-per-node N",
            )
        if (dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])) < 2:
            raise EngineError(
                "a single rank has nothing to split",
                "start more ranks, or use the transformers engine",
            )
        here = int(os.environ["LOCAL_RANK"])
        if kind == "cuda":
            if here >= torch.cuda.device_count():
                raise EngineError(
                    f"rank {here} of this host has no GPU: PyTorch sees"
                    f" {torch.cuda.device_count()}",
                    "start as many ranks per host as it has GPUs, or write cpu",
                )
            torch.cuda.set_device(here)
        try:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_PATIENCE)
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"rank cannot reach the others: {first_line(error)}",
                "look at how the ranks were started",
            ) from error
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            "cpu" if kind == "cpu" else f"cuda:{here}",
            group,
        )

    def sharding(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that split a model over these ranks by the plan
        that transformers has for it."""
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.distributed import DistributedConfig

        mesh = init_device_mesh(self.device.partition(":")[0], (self.world,))
        config = DistributedConfig(tp_size=self.world)
        _cache_meshes(config)
        return {"distributed_config": config, "device_mesh": mesh}

    @contextlib.contextmanager
    def step(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Run a `with` block that ends on all ranks together, or fails on all of them. `name` is
        the same on all ranks.

        Args:
            wait: for ranks that are still in another step; each of them fails there.

        Raises:
            Exception: what was raised on this rank.
            PaFastError: what was raised on another rank, which is named.
            EngineError: a rank is in another step, or gone.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            self._confess(name, error, wait)
            raise
        _check_reports(self._meet(_Report(name), wait))

    def gather(self, name: str, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns on each rank, by rank; fails like `step`."""
        try:
            mine = _Report(name, work())
        except Exception as error:
            self._confess(name, error)
            raise
        reports = self._meet(mine)
        _check_reports(reports)
        return [report.value for report in reports]

    def agree(self, name: str, value: object) -> None:
        """Check that `value` is the same on all ranks.

        Raises:
            EngineError: it is not, or see `step`.
        """
        values = self.gather(name, lambda: value)
        if any(other != values[0] for other in values):
            values_by_rank = ", ".join(
                f"rank {rank} has {other}" for rank, other in enumerate(values)
            )
            raise EngineError(
                f"the ranks differ in {name}: {values_by_rank}",
                "give every rank the same arguments and files",
            )

    def broadcast(self, name: str, value: T | None) -> T:
        """Return `value` of rank 0 on every rank; fails like `step`."""
        first: Any = self.gather(name, lambda: value if self.rank == 0 else None)[0]
        return first

    def _confess(self, name: str, error: BaseException, wait: bool = False) -> None:
        """Report `error` to the others; if they are gone too, that error is not raised."""
        with contextlib.suppress(EngineError):
            self._meet(_Report(name, failure=_failure(error)), wait)

    def _meet(self, mine: _Report, wait: bool = False) -> list[_Report]:
        """Return every rank's report, by rank."""
        import torch.distributed as dist

        reports: list[Any] = [None] * self.world
        try:
            while None in reports or (wait and any(report.step != mine.step for report in reports)):
                dist.all_gather_object(reports, mine, group=self._group)
        except RuntimeError as error:
            raise EngineError(
                f"rank {self.rank} has lost the others in {mine.step}: {first_line(error)}",
                "see what the rank said that ended first",
            ) from error
        return reports


def _cache_meshes(config: Any) -> None:
    """Make transformers' device meshes for `config` here, where all ranks are, and cache them.

    From 5.24 on every `from_pretrained` makes meshes of its own, which is a collective: all would
    wait for a rank that failed before it. Earlier releases take the mesh that they are given.
    """
    import torch.distributed as dist
    from transformers.distributed import mixin

    make = getattr(mixin, "initialize_distributed_mesh", None)
    if make is None:
        return
    make = getattr(make, "__wrapped__", make)
    mesh, world_group = make(config), dist.group.WORLD

    @functools.wraps(make)
    def cached(given: Any) -> Any:
        return (
            mesh
            if dist.group.WORLD is world_group and given.tp_size == config.tp_size
            else make(given)
        )

    mixin.initialize_distributed_mesh = cached


def _check_reports(reports: list[_Report]) -> None:
    for rank, report in enumerate(reports):
        if report.failure is not None:
            raise report.failure.kind(
                f"on rank {rank}: {report.failure.message}", report.failure.hint
            )
    if len({report.step for report in reports}) > 1:
        steps = ", ".join(f"rank {rank} in {report.step}" for rank, report in enumerate(reports))
        raise EngineError(
            f"the ranks are out of step: {steps}",
            "every rank must make the same calls in the same order",
        )


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, PaFastError):
        return _Failure(type(error), error.message, error.hint)
    return _Failure(EngineError, f"{type(error).__name__}: {first_line(error)}", None)

"""λ-parallel sweeps on Ray: workers that load the pair once, each taking the next λ when it is
free.

Has been run for real on CPU, on a cluster of one machine. A worker on a GPU differs in the
resources that it asks for, and has not been run yet.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import pathlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pa_fast.base import Engine, Evaluator, Lambda, complete
from pa_fast.errors import EngineError, MissingExtra, PaFastError, UsageError, first_line
from pa_fast.run import SweepSpec, evaluators, opened
from pa_fast.sweep import schedule
from pa_fast.sweep.driver import Repeats, check_evaluators, distinct, finished, note_repeat
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.journal import check_folder
from pa_fast.sweep.manifest import describe
from pa_fast.sweep.point import Record, check_reach, visit
from pa_fast.sweep.recording import Recording

if TYPE_CHECKING:
    from pa_fast.sweep.manifest import Manifest
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult

MOST_DEATHS = 5
"""After so many workers died on it a point counts as failed, or loading as hopeless."""

_PATIENCE_S = 60
_LOOK_S = 5


def run(job: SweepSpec, workers: int, progress: Progress | None = None) -> SweepResult:
    """Run `job` with `workers` Ray actors: on the cluster's GPUs where it has any, unless its
    device is `cpu`.

    Raises:
        UsageError: a device of one number for all workers; else see `sweep`.
    """
    if ":" in job.device:
        raise UsageError(
            f"device `{job.device}` for {workers} workers",
            "write cuda: Ray gives each worker a GPU of its own",
        )
    points = schedule.lambdas(job.lambdas)
    out = pathlib.Path(os.path.abspath(job.out))
    check_folder(out)
    evaluators(job)  # what is wrong in them fails here, before anything is started
    gpus = 0 if job.device == "cpu" else None
    make = functools.partial(opened, job)
    return sweep(make, points, out, workers, gpus=gpus, overwrite=job.overwrite, progress=progress)


def sweep(
    make: Callable[[], tuple[Engine, Sequence[Evaluator]]],
    lambdas: str | Iterable[float | str | Lambda],
    out: str | os.PathLike[str],
    workers: int,
    *,
    gpus: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    figure: bool = True,
) -> SweepResult:
    """`pa_fast.sweep` with `workers` Ray actors, each a process that calls `make` once for an
    engine and evaluators.

    On the Ray that is running, else on the cluster that RAY_ADDRESS names, else on one of this
    machine, started and stopped here. Workers share the cores equally, and start in the folder of
    this process where it exists. Their records come back to this process, which alone writes the
    run folder. A worker that dies loses its running point, which the next one runs; a point that
    five workers died on counts as failed.

    Args:
        make: sent to every worker; must give the same engine and evaluators there.
        lambdas, out, overwrite, progress, figure: see `pa_fast.sweep`.
        gpus: for each worker; None: one where the cluster has any.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: more workers than the cluster has places for.
        EngineError: workers die again and again in `make`, or Ray's agent on this machine dies.
        PaFastError: whatever `make` and `pa_fast.sweep` raise.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers", "give at least 1")
    points = schedule.lambdas(lambdas)
    ray = _ray()
    with (
        _cluster(ray),
        _Pool(ray, min(workers, len(points)), gpus, os.getcwd(), make, points) as pool,
    ):
        with Recording(
            out, points, pool.manifest, overwrite=overwrite, progress=progress
        ) as recording:
            pool.run(recording)
        return finished(recording, figure)


class _Seat:
    """What runs inside an actor."""

    def open(
        self,
        folder: str,
        make: Callable[[], tuple[Engine, Sequence[Evaluator]]],
        points: Sequence[Lambda],
    ) -> Manifest:
        if os.path.isdir(folder):
            # paths and modules of the command line are relative to where it was typed
            os.chdir(folder)
            sys.path.insert(0, folder)
        engine, asked = make()
        self._engine = complete(engine)
        self._evaluators = distinct(asked)
        check_reach(self._engine, points)
        check_evaluators(self._engine, self._evaluators)
        return describe(self._engine, points, self._evaluators)

    def visit(self, lam: Lambda, names: Sequence[str], recorded: int | None) -> Iterator[Record]:
        yield from visit(
            self._engine, lam, [e for e in self._evaluators if e.name in names], recorded
        )


class _Place:
    """One of the pool's workers as the pool sees it: an actor, and what it is busy with (`lam` is
    None while it loads)."""

    def __init__(self, actor: Any, busy: Any):
        self.actor, self.busy = actor, busy
        self.lam: Lambda | None = None
        self.names: list[str] = []


class _Pool:
    """`workers` actors on their way through a queue of λ."""

    def __init__(self, ray: Any, workers: int, gpus: int | None, *work: Any):
        self._ray = ray
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        # Ray tells the numeric libraries of an actor to use as many threads as it has cores.
        self._actor = ray.remote(_Seat).options(num_cpus=_share(ray, workers, gpus), num_gpus=gpus)
        self._node = ray.get_runtime_context().get_node_id()
        self._work = work
        self._deaths: Counter[tuple[str, str] | None] = Counter()
        self._queue: deque[tuple[Lambda, list[str]]] = deque()
        self._repeats = Repeats()
        self._places = [self._hire() for _ in range(workers)]

    def __enter__(self) -> _Pool:
        try:
            self.manifest = self._first()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places:
            self._ray.kill(place.actor)

    def run(self, recording: Recording) -> None:
        """Bring every missing point of `recording` into it."""
        self._repeats = Repeats(recording.scored())
        self._queue.extend(recording.missing())
        waiting = list(self._places)
        # a worker that still loads when nothing is left to do is not waited for: it may never find
        # its place on the cluster
        while waiting and (self._queue or any(place.lam is not None for place in waiting)):
            place = self._ready(waiting)
            if not self._step(place, recording):
                waiting.remove(place)

    def _step(self, place: _Place, recording: Recording) -> bool:
        """Take what `place` has ready, and give it more to do; False when there is nothing."""
        try:
            if place.lam is None:
                recording.join(self._got(place.busy))
            else:
                record = self._got(next(place.busy))
                note_repeat(self._repeats, recording, recording.record(record))
                place.names.remove(record.entry.evaluator)
                return True
        except StopIteration:
            pass
        except self._ray.exceptions.RayActorError as error:
            self._bury(place, error, recording)
            return True
        self._queue = deque(
            (lam, left) for lam, names in self._queue if (left := self._repeats.remaining(names))
        )
        if not self._queue:
            return False
        place.lam, place.names = self._queue.popleft()
        visit = place.actor.visit.options(num_returns="streaming")
        place.busy = visit.remote(place.lam, list(place.names), recording.checksum(place.lam))
        return True

    def _bury(self, place: _Place, error: Exception, recording: Recording) -> None:
        """Put a new worker in the place of a dead one, and its unfinished points back into the
        queue."""
        if place.lam is not None and place.names:
            point = place.lam.key, place.names[0]
            self._deaths[point] += 1
            if self._deaths[point] >= MOST_DEATHS:
                message = (
                    f"{MOST_DEATHS} workers died at this point, the last one so:"
                    f" {first_line(error)}"
                )
                recording.record(Record(Entry(*point, error=message)))
                del place.names[0]
            if place.names:
                self._queue.append((place.lam, place.names))
        elif place.lam is None:
            self._count_death_at_load(error)
        fresh = self._hire()
        place.actor, place.busy, place.lam, place.names = fresh.actor, fresh.busy, None, []

    def _first(self) -> Manifest:
        """The manifest of the worker that is ready first; the others go on loading."""
        while True:
            place = self._ready(self._places)
            try:
                manifest: Manifest = self._got(place.busy)
                return manifest
            except self._ray.exceptions.RayActorError as error:
                self._count_death_at_load(error)
                self._places[self._places.index(place)] = self._hire()

    def _ready(self, places: Sequence[_Place]) -> _Place:
        """The first of `places` that has something; Ray itself waits for ever where its agent on
        this machine is gone."""
        for waited_s in itertools.count(_LOOK_S, _LOOK_S):
            ready, _ = self._ray.wait(
                [place.busy for place in places], num_returns=1, timeout=_LOOK_S
            )
            if ready:
                return next(place for place in places if place.busy == ready[0])
            self._check_agent()
            if waited_s % _PATIENCE_S == 0 and all(place.lam is None for place in self._places):
                logging.getLogger("pa_fast").warning(
                    "no worker is ready yet: they load, or wait for others on the Ray cluster"
                )
        raise AssertionError

    def _check_agent(self) -> None:
        if not any(node["NodeID"] == self._node and node["Alive"] for node in self._ray.nodes()):
            raise EngineError(
                "Ray's agent on this machine (raylet) has died, and with it the connection to the"
                " workers",
                "look whether memory ran out; then run the same command again: finished points are"
                " kept",
            )

    def _hire(self) -> _Place:
        actor = self._actor.remote()
        return _Place(actor, actor.open.remote(*self._work))

    def _got(self, reference: Any) -> Any:
        """The value behind `reference`, or the error of pa_fast that stands there, as it was
        raised."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PaFastError):
                raise error.cause from None
            raise

    def _count_death_at_load(self, error: Exception) -> None:
        self._deaths[None] += 1
        if self._deaths[None] >= MOST_DEATHS:
            raise EngineError(
                f"{MOST_DEATHS} workers died while they loaded the pair, the last one so:"
                f" {first_line(error)}",
                "each worker holds a live copy of its own: take fewer --workers if memory is short",
            )


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtra(
            "more than one worker needs Ray, which is not installed", "pip install 'pa_fast[ray]'"
        ) from None
    return ray


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """A connection to the caller's cluster, or to one of this machine for as long as the block
    lasts."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" in os.environ:
        try:
            ray.init(**quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineError(
                f"the Ray cluster at {os.environ['RAY_ADDRESS']} cannot be reached:"
                f" {first_line(error)}",
                "check RAY_ADDRESS, or unset it to use this machine",
            ) from error
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                **quiet,
            )
        except Exception as error:  # Ray's own are no more than that
            raise EngineError(
                f"Ray cannot be started on this machine: {first_line(error)}",
                "run again; a busy machine starts it too slowly",
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _share(ray: Any, workers: int, gpus: int) -> int:
    """The most cores that each of `workers` can have, so that all find a place on the cluster's
    nodes.

    Raises:
        UsageError: there are not as many places.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(sum(node.get("CPU", 0) for node in nodes)) // workers
    for cores in range(most, 0, -1):
        places = (
            min(node.get("CPU", 0) // cores, node.get("GPU", 0) // gpus if gpus else workers)
            for node in nodes
        )
        if sum(places) >= workers:
            return cores
    have = f"{sum(node.get('CPU', 0) for node in nodes):g} cores" + (
        f" and {sum(node.get('GPU', 0) for node in nodes):g} GPUs" if gpus else ""
    )
    needs = "a core and a GPU" if gpus else "a core"
    raise UsageError(
        f"{workers} workers on a Ray cluster of {have}",
        f"each worker needs {needs}: take fewer, or --device cpu",
    )

"""λ-parallel sweeps on Ray: each worker loads the pair once, and takes the next λ when it is free.

Tested on CPU, on a cluster of one machine. A worker on a GPU asks for other resources, and has not
been run yet.
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
from pa_fast.run import SweepSpec, check_store, evaluators, opened
from pa_fast.sweep.driver import Repeats, check_evaluators, distinct, finished, note_repeat
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.journal import check_folder
from pa_fast.sweep.manifest import describe
from pa_fast.sweep.point import MERGED_EVERY, Record, check_reach, visit
from pa_fast.sweep.recording import Recording, check_reference
from pa_fast.sweep.schedule import Schedule
from pa_fast.units import format_count

if TYPE_CHECKING:
    from pa_fast.sweep.manifest import Manifest
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult

MOST_DEATHS = 5
"""Deaths of workers after which a point counts as failed, or loading is given up."""

_PATIENCE_S = 60
_LOOK_S = 5


def run(job: SweepSpec, workers: int, progress: Progress | None = None) -> SweepResult:
    """Run `job` with `workers` Ray actors: on GPUs if the cluster has any and the job's device is
    not `cpu`.

    Raises:
        UsageError: the job names one numbered device, such as `cuda:0`; else see `sweep`.
    """
    if ":" in job.device:
        raise UsageError(
            f"device `{job.device}` for {workers} workers",
            "write cuda: Ray gives each worker a GPU of its own",
        )
    schedule = job.schedule()
    out = pathlib.Path(os.path.abspath(job.out))
    check_folder(out)
    # their errors are raised here, before anything is started
    schedule = schedule.resolved([evaluator.name for evaluator in evaluators(job)])
    check_reference(schedule, out, job.overwrite)
    check_store(job, schedule.points)
    gpus = 0 if job.device == "cpu" else None
    make = functools.partial(opened, job, schedule.points)
    # stdout is for data, and Ray prints there that a worker died
    with contextlib.redirect_stdout(sys.stderr):
        return sweep(
            make,
            schedule,
            out,
            workers,
            gpus=gpus,
            ranks=job.ranks,
            overwrite=job.overwrite,
            progress=progress,
        )


def sweep(
    make: Callable[[], tuple[Engine, Sequence[Evaluator]]],
    lambdas: str | Iterable[float | str | Lambda] | Schedule,
    out: str | os.PathLike[str],
    workers: int,
    *,
    gpus: int | None = None,
    ranks: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
    figure: bool = True,
) -> SweepResult:
    """Run `pa_fast.sweep` with `workers` Ray actors. Each is a process that calls `make` once for
    an engine and evaluators.

    The sweep uses the Ray cluster that this process is connected to, else the one that RAY_ADDRESS
    names, else it starts one on this machine and stops it at the end. Workers share the cores
    equally, and start in the working directory of this process if it exists on their machine. Only
    this process writes the run folder. If a worker dies, another one repeats its point; a point at
    which five workers died counts as failed.

    Args:
        make: pickled and called on every worker; must return the same engine and evaluators on
            each.
        lambdas, out, overwrite, progress, figure: see `pa_fast.sweep`.
        gpus: number for each worker; by default one for each of its ranks if the cluster has GPUs,
            else 0.
        ranks: processes that the engine of one worker is split over.

    Example:
        def make():
            return pa_fast.load(base, instruct), [pa_fast.evaluator("icl:tasks.jsonl")]

        pa_fast.ray.sweep(make, "0:1:0.1", "runs/x", workers=4)

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: more workers than the cluster has cores or GPUs for.
        EngineError: workers keep dying in `make`, or Ray's agent on this machine dies.
        PaFastError: as `make` and `pa_fast.sweep`.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers", "give at least 1")
    schedule = Schedule.of(lambdas)
    ray = _ray()
    with (
        _cluster(ray),
        _Pool(
            ray, min(workers, len(schedule.points)), gpus, ranks, os.getcwd(), make, schedule
        ) as pool,
    ):
        schedule = schedule.resolved([one.name for one in pool.manifest.evaluators])
        with Recording(
            out, schedule, pool.manifest, overwrite=overwrite, progress=progress
        ) as recording:
            pool.run(recording)
        return finished(recording, figure)


class _Actor:
    """Code of a worker, which runs inside an actor."""

    def open(
        self,
        folder: str,
        make: Callable[[], tuple[Engine, Sequence[Evaluator]]],
        schedule: Schedule,
    ) -> Manifest:
        if os.path.isdir(folder):
            # paths and modules on the command line are relative to its folder
            os.chdir(folder)
            sys.path.insert(0, folder)
        engine, given = make()
        self._engine = complete(engine)
        self._evaluators = distinct(given)
        self._visited = 0
        schedule = schedule.resolved([evaluator.name for evaluator in self._evaluators])
        check_reach(self._engine, schedule.points)
        check_evaluators(self._engine, self._evaluators, schedule)
        return describe(self._engine, schedule, self._evaluators)

    def visit(self, lam: Lambda, names: Sequence[str], recorded: int | None) -> Iterator[Record]:
        merge_again = self._visited % MERGED_EVERY == 0
        self._visited += 1
        queue = [e for e in self._evaluators if e.name in names]
        yield from visit(self._engine, lam, queue, recorded, merge_again=merge_again)


class _Worker:
    """A worker of the pool: an actor, and the task that it is busy with, None where it is free
    (`lam` is None while it loads)."""

    def __init__(self, actor: Any, busy: Any):
        self.actor, self.busy = actor, busy
        self.lam: Lambda | None = None
        self.names: list[str] = []


class _Pool:
    """Pool of actors that evaluate a queue of λ."""

    def __init__(self, ray: Any, workers: int, gpus: int | None, ranks: int, *work: Any):
        self._ray = ray
        if gpus is None:
            gpus = ranks if ray.cluster_resources().get("GPU", 0) else 0
        # Ray limits the numeric libraries of an actor to as many threads as it has cores
        cores = cores_per_worker(ray, workers, gpus)
        self._actor = ray.remote(_Actor).options(num_cpus=cores, num_gpus=gpus)
        self._node = ray.get_runtime_context().get_node_id()
        self._work = work
        self._deaths: Counter[tuple[str, str] | None] = Counter()
        self._queue: deque[tuple[Lambda, list[str]]] = deque()
        self._repeats = Repeats()
        self._workers = [self._hire() for _ in range(workers)]

    def __enter__(self) -> _Pool:
        try:
            self.manifest = self._first()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def run(self, recording: Recording) -> None:
        """Evaluate and record every missing point of `recording`, those included that its schedule
        adds."""
        self._repeats = Repeats(recording.scored())
        self._run_missing(recording)
        while recording.extend():
            self._run_missing(recording)

    def _run_missing(self, recording: Recording) -> None:
        self._queue.extend(recording.missing())
        for worker in self._workers:
            if worker.busy is None:
                self._give(worker, recording)
        # a worker that still loads when no point is missing is not waited for: the cluster may
        # never have free resources for it
        while self._queue or any(worker.busy and worker.lam for worker in self._workers):
            busy = [worker for worker in self._workers if worker.busy is not None]
            if not busy:
                return
            self._step(self._ready(busy), recording)

    def _step(self, worker: _Worker, recording: Recording) -> None:
        """Take the result that `worker` has ready, and give it the next λ where it has none
        left."""
        try:
            if worker.lam is None:
                recording.join(self._got(worker.busy))
            else:
                record = self._got(next(worker.busy))
                note_repeat(self._repeats, recording, recording.record(record))
                worker.names.remove(record.entry.evaluator)
                return
        except StopIteration:
            pass
        except self._ray.exceptions.RayActorError as error:
            self._bury(worker, error, recording)
            return
        self._give(worker, recording)

    def _give(self, worker: _Worker, recording: Recording) -> None:
        """Give `worker` the next λ, or leave it free where there is none."""
        self._queue = deque(
            (lam, remaining)
            for lam, names in self._queue
            if (remaining := self._repeats.remaining(names))
        )
        worker.busy = None
        if not self._queue:
            return
        worker.lam, worker.names = self._queue.popleft()
        visit = worker.actor.visit.options(num_returns="streaming")
        worker.busy = visit.remote(worker.lam, list(worker.names), recording.checksum(worker.lam))

    def _bury(self, worker: _Worker, error: Exception, recording: Recording) -> None:
        """Replace a dead worker by a new one, and return its unfinished points to the queue."""
        if worker.lam is not None and worker.names:
            point = worker.lam.key, worker.names[0]
            self._deaths[point] += 1
            if self._deaths[point] >= MOST_DEATHS:
                message = (
                    f"{MOST_DEATHS} workers died at this point, the last one so:"
                    f" {first_line(error)}"
                )
                recording.record(Record(JournalEntry(*point, error=message)))
                del worker.names[0]
            if worker.names:
                self._queue.append((worker.lam, worker.names))
        elif worker.lam is None:
            self._count_death_at_load(error)
        fresh = self._hire()
        worker.actor, worker.busy, worker.lam, worker.names = fresh.actor, fresh.busy, None, []

    def _first(self) -> Manifest:
        """Return the manifest of the first worker that is loaded; the others go on loading."""
        while True:
            worker = self._ready(self._workers)
            try:
                manifest: Manifest = self._got(worker.busy)
                return manifest
            except self._ray.exceptions.RayActorError as error:
                self._count_death_at_load(error)
                self._workers[self._workers.index(worker)] = self._hire()

    def _ready(self, workers: Sequence[_Worker]) -> _Worker:
        """Return the first of `workers` that has a result."""
        loading = all(worker.lam is None for worker in self._workers)
        ready = first_ready(self._ray, self._node, [worker.busy for worker in workers], loading)
        return next(worker for worker in workers if worker.busy == ready)

    def _hire(self) -> _Worker:
        actor = self._actor.remote()
        return _Worker(actor, actor.open.remote(*self._work))

    def _got(self, reference: Any) -> Any:
        """Return the value of `reference`. An error of pa_fast in it is raised unwrapped."""
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


def first_ready(ray: Any, node: str, references: Sequence[Any], loading: bool) -> Any:
    """Return the first of `references` that is ready. If all workers are `loading`, a warning says
    now and then that none is.

    Waits with a timeout and checks Ray's agent on this machine, `node`: without it `ray.wait` never
    returns.

    Raises:
        EngineError: the agent has died.
    """
    for waited_s in itertools.count(_LOOK_S, _LOOK_S):
        ready, _ = ray.wait(list(references), num_returns=1, timeout=_LOOK_S)
        if ready:
            return ready[0]
        if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
            raise EngineError(
                "Ray's agent on this machine (raylet) has died, and with it the connection to the"
                " workers",
                "look whether memory ran out; then run the same command again: finished points are"
                " kept",
            )
        if loading and waited_s % _PATIENCE_S == 0:
            logging.getLogger("pa_fast").warning(
                "no worker is ready yet: they load, or wait for others on the Ray cluster"
            )
    raise AssertionError


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connect to the caller's cluster, or to a new one on this machine, within a `with` block."""
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
        except Exception as error:  # Ray's own errors have no narrower class
            raise EngineError(
                f"Ray cannot be started on this machine: {first_line(error)}",
                "run again; a busy machine starts it too slowly",
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def cores_per_worker(ray: Any, workers: int, gpus: int) -> int:
    """Return the most cores that each of `workers` can have on the cluster's nodes.

    Raises:
        UsageError: the cluster does not have the resources for as many.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(sum(node.get("CPU", 0) for node in nodes)) // workers
    for cores in range(most, 0, -1):
        slots = (
            min(node.get("CPU", 0) // cores, node.get("GPU", 0) // gpus if gpus else workers)
            for node in nodes
        )
        if sum(slots) >= workers:
            return cores
    have = f"{sum(node.get('CPU', 0) for node in nodes):g} cores" + (
        f" and {sum(node.get('GPU', 0) for node in nodes):g} GPUs" if gpus else ""
    )
    needs = f"a core and {format_count(gpus, 'GPU')}" if gpus else "a core"
    raise UsageError(
        f"{workers} workers on a Ray cluster of {have}",
        f"each worker needs {needs}: take fewer, or --device cpu",
    )

"""The sweep of a command line: its specification, and the engine and evaluators made of it."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pa_fast import evals
from pa_fast.base import CompleteEngine, CompleteEvaluator, Lambda, complete
from pa_fast.errors import EngineError, PairError, UsageError
from pa_fast.files import check_own_folder, path_of
from pa_fast.question import parse_keep
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule
from pa_fast.sweep.driver import check_evaluators, distinct
from pa_fast.sweep.entry import Shard
from pa_fast.sweep.journal import check_folder
from pa_fast.sweep.point import MERGED_EVERY, Record, check_reach, visit
from pa_fast.sweep.progress import listening
from pa_fast.sweep.recording import check_reference
from pa_fast.sweep.schedule import Schedule, lambdas

if TYPE_CHECKING:
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


ENGINES = {
    "transformers": "pa_fast.engines.transformers",
    "tensor-parallel": "pa_fast.engines.tensor_parallel",
    "vllm": "pa_fast.engines.vllm.engine",
    "sglang": "pa_fast.engines.sglang.engine",
}
"""Name of an engine → the module whose `load` makes it."""


@dataclass(frozen=True)
class ServingArguments:
    """An engine that has arguments of its own: its name in messages, and those of its arguments
    that a sweep knows.

    Attributes:
        ranks: the number of processes that the model is split over.
        batch: the most requests of one forward pass.
    """

    name: str
    ranks: str
    batch: str


_SERVING = {
    "vllm": ServingArguments("vLLM", "tensor_parallel_size", "max_num_seqs"),
    "sglang": ServingArguments("SGLang", "tp_size", "max_running_requests"),
}


@dataclass(frozen=True)
class SweepSpec:
    """One `pa-fast sweep`, as text and numbers: everything that a process needs to run it."""

    base: str
    instruct: str | None
    lambdas: str
    evals: tuple[str, ...]
    out: str
    device: str = "auto"
    dtype: str = "auto"
    store: str = "auto"
    tokenizer: str | None = None
    batch_size: int = 8
    limit: int | None = None
    seed: int = 0
    allow_nonfinite: bool = False
    overwrite: bool = False
    engine: str = "transformers"
    engine_args: tuple[str, ...] = ()
    delta: str | None = None
    rounding: str = "nearest"
    rule: LambdaRule | None = None
    extra_rows: str = "instruct"
    residency: str = "auto"
    one_sided: str | None = None
    ignore_config: tuple[str, ...] = ()
    strip_prefix: tuple[str, ...] = ()
    objective: str | None = None
    keep: tuple[str, ...] = ()
    budget: int | None = None

    def schedule(self) -> Schedule:
        """Return the λ to evaluate, and the question; see `Schedule.of`."""
        return Schedule.of(self.lambdas, self.objective, parse_keep(self.keep), self.budget)

    @property
    def ranks(self) -> int:
        """The number of processes that a serving engine splits the model over; 1 for others."""
        if self.engine not in _SERVING:
            return 1
        ranks = arguments_of(self.engine_args).get(_SERVING[self.engine].ranks, 1)
        return ranks if isinstance(ranks, int) else 1

    def load_options(self) -> dict[str, Any]:
        """The keyword arguments of `load`; those of another engine lack what is not asked for.

        Raises:
            UsageError: an option is not for this engine, or `engine_args` is malformed.
        """
        if self.engine in _SERVING:
            return self._serving_options(_SERVING[self.engine])
        if self.engine_args:
            raise UsageError(
                f"--engine-args {self.engine_args[0]} with --engine {self.engine}",
                f"they are for --engine {' and '.join(_SERVING)}: add one, or leave them out",
            )
        options = {name: getattr(self, name) for name in _LOADING}
        if self.rounding != "nearest":
            options["seed"] = self.seed
        if self.residency != "auto":
            options["residency"] = self.residency
        return options

    def _serving_options(self, serving: ServingArguments) -> dict[str, Any]:
        for option, value, usual, instead in (
            ("--delta", self.delta, None, "name INSTRUCT after BASE"),
            ("--device", self.device, "auto", f"{serving.name} takes the devices that it finds"),
            ("--batch-size", self.batch_size, 8, f"use --engine-args {serving.batch}=N"),
        ):
            if value != usual:
                raise UsageError(f"{option} {value} with --engine {self.engine}", instead)
        options = {name: getattr(self, name) for name in _PAIRING}
        options["store"] = "dense" if self.store == "auto" else self.store
        if self.residency != "auto":
            options["residency"] = self.residency
        seed = None if self.rounding == "nearest" else self.seed
        options["rounding"] = Rounding.of(self.rounding, seed)
        return options | {"dtype": self.dtype} | arguments_of(self.engine_args)


_PAIRING = (
    *("tokenizer", "allow_nonfinite", "rule"),
    *("extra_rows", "one_sided", "ignore_config", "strip_prefix"),
)
_LOADING = (
    *("device", "dtype", "store", "batch_size", "delta", "rounding"),
    *_PAIRING,
)


def arguments_of(texts: Iterable[str]) -> dict[str, Any]:
    """Return the keyword arguments in `texts`, each `key=value`: a number, true, false, null or
    JSON, and text otherwise.

    Raises:
        UsageError: one is not of that form, or a key is there twice.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        key, mark, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not mark or not key.isidentifier():
            raise UsageError(
                f"--engine-args `{text}`: expected key=value", "such as tensor_parallel_size=2"
            )
        if key in arguments:
            raise UsageError(f"--engine-args {key} is given twice", "give it once")
        try:
            arguments[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            arguments[key] = value
    return arguments


def run_points(job: SweepSpec, points: Iterable[float | str | Lambda]) -> Iterator[Record]:
    """Run every evaluator of `job` at each of `points`, and yield the journal's lines with their
    items and texts.

    For custom launchers: nothing is written, and no folder is touched; `pa_fast.sweep.recording`
    writes.
    """
    schedule = lambdas(points)
    model, requested = opened(job, schedule)
    check_reach(model, schedule)
    check_evaluators(model, requested)
    for visited, lam in enumerate(schedule):
        yield from visit(model, lam, requested, merge_again=visited % MERGED_EVERY == 0)


def run(
    job: SweepSpec, progress: Progress | None = None, shard: tuple[int, int] | None = None
) -> SweepResult:
    """Load the pair and the evaluators that `job` names, and sweep in this process."""
    from pa_fast.sweep import sweep

    schedule = job.schedule()
    # absolute: modules of evaluators may change the working folder when they are imported
    out = pathlib.Path(os.path.abspath(path_of(job.out, "--out")))
    check_folder(out, None if shard is None else Shard(*shard))
    requested = evaluators(job)
    schedule = schedule.resolved([evaluator.name for evaluator in requested])
    check_reference(schedule, out, job.overwrite)
    model = _opened(job, schedule.points)
    for note in model.notes:
        listening(progress).noted(note)
    return sweep(
        model, schedule, requested, out, overwrite=job.overwrite, progress=progress, shard=shard
    )


def confirm(
    job: SweepSpec, result: SweepResult, count: int, progress: Progress | None = None
) -> SweepResult:
    """Evaluate the `count` best points of each column of `result`, of a lossy store, again with an
    exact one.

    They are a run of their own, in the folder `confirmed` of the first run.

    Raises:
        UsageError, PairError: see `check_confirm`.
    """
    check_confirm(job)
    best = {row.lam for name in result.evaluators for row in result.ranked(name)[:count]}
    points = ",".join(lam.key for lam in sorted(best, key=lambda lam: lam.exact))
    folder = pathlib.Path(job.out) / "confirmed"
    check_own_folder(folder)
    exact = replace(
        job, store="dense", delta=None, lambdas=points, out=str(folder), keep=(), budget=None
    )
    return run(exact, progress)


def check_confirm(job: SweepSpec) -> None:
    """Check that `confirm` can run, before a sweep of hours.

    Raises:
        UsageError: there is no instruct model, or the delta is lossless.
        PairError: the delta is of another instruct model.
    """
    from pa_fast.live import opening
    from pa_fast.stores import registry

    if job.instruct is None:
        raise UsageError(
            "--confirm needs the instruct model beside the delta", "name INSTRUCT after BASE"
        )
    held: Any = (
        registry.named(job.store) if job.delta is None else opening.description_of(job.delta)
    )
    if held.lossless and not held.attached:
        raise UsageError("nothing to confirm: this delta loses nothing", "leave out --confirm")
    check_beside_delta(job)


def check_beside_delta(job: SweepSpec) -> None:
    """Check that the instruct model named beside a delta file is the one that it was encoded from,
    before a sweep of hours.

    The file of an adapter, or of tensors that came from no files, has no instruct model to compare.

    Cost: reads the headers of the instruct model, and samples of its weights.

    Raises:
        PairError: it is another one.
        CheckpointError: one of the two cannot be read.
    """
    from pa_fast.checkpoint.folder import resolve
    from pa_fast.checkpoint.pair import stripped
    from pa_fast.checkpoint.reader import Checkpoint
    from pa_fast.live import opening

    if job.instruct is None or job.delta is None:
        return
    held = opening.description_of(job.delta)
    expected = held.instruct.quick
    if expected is None or held.instruct == held.base:
        return
    with Checkpoint.open(resolve(job.instruct)) as instruct:
        # of the names that it was encoded under
        fingerprint = stripped(instruct, job.strip_prefix).quick_fingerprint()
    if fingerprint != expected:
        raise PairError(
            f"{job.delta} was encoded from an instruct model of quick fingerprint {expected},"
            f" {job.instruct} has {fingerprint}",
            "name the instruct model that the delta stands for, or none; --tokenizer takes the"
            " tokenizer of another folder",
        )


def opened(
    job: SweepSpec, points: Iterable[Lambda]
) -> tuple[CompleteEngine, list[CompleteEvaluator]]:
    """Return the engine and the evaluators of `job`. Errors in data files, and of `points` that the
    store is not for, are raised before a model is loaded.

    The global random generators are seeded, and `visit` restores their state after each evaluation,
    so an evaluator draws the same numbers at every λ, in every process and after every resume.
    """
    requested = evaluators(job)
    return _opened(job, points), requested


def _opened(job: SweepSpec, points: Iterable[Lambda]) -> CompleteEngine:
    check_store(job, points)
    loaded = engine(job)
    _seed_generators()
    return loaded


def check_store(job: SweepSpec, points: Iterable[Lambda]) -> None:
    """Check, before the pair is loaded, that the store of `job` is for every λ of `points`.

    A delta file has a range of its own, and a rule gives other λ by names in the checkpoint: those
    are checked when the weights are bound, see `check_reach`.

    Raises:
        UsageError: there is no such store, or a λ is outside its range.
    """
    from pa_fast.stores import registry

    if job.delta is None and job.rule is None:
        registry.named(job.store).check([float(lam) for lam in points])


def _seed_generators() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def evaluators(job: SweepSpec) -> list[CompleteEvaluator]:
    """Return the evaluators of `job`, their data read and checked.

    Raises:
        UsageError, EvaluatorError: a malformed EVAL, or two columns of the same name.
    """
    return distinct(
        [evals.build(one, limit=job.limit, seed=job.seed) for one in evals.parse_all(job.evals)]
    )


def engine(job: SweepSpec) -> CompleteEngine:
    """Load the pair of `job` at λ = 0."""
    if job.engine not in ENGINES:
        raise UsageError(f"there is no engine `{job.engine}`", f"engines: {', '.join(ENGINES)}")
    options = job.load_options()
    loaded = importlib.import_module(ENGINES[job.engine]).load(job.base, job.instruct, **options)
    if loaded.tokenizer is None:
        looked = job.tokenizer or job.instruct or job.base
        raise EngineError(
            f"{looked} has no tokenizer files, and evaluators need one",
            "pass --tokenizer with a folder that has",
        )
    return complete(loaded)

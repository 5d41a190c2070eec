"""Sweeps of one model that several ranks hold together: every rank runs the same evaluators in
lockstep, and only rank 0 writes the run folder.

Every rank makes the same calls in the same order, so an evaluator may use the model in any way,
with or without the engine.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pa_fast.base import CompleteEvaluator, Engine, Evaluator, Lambda, Score
from pa_fast.run import SweepSpec, opened
from pa_fast.sweep.driver import Repeats, check_evaluators, distinct, finished, note_repeat
from pa_fast.sweep.journal import check_folder
from pa_fast.sweep.manifest import describe
from pa_fast.sweep.point import MERGED_EVERY, check_reach, visit
from pa_fast.sweep.recording import Recording
from pa_fast.sweep.schedule import Schedule

if TYPE_CHECKING:
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


def sweep(
    lm: Any,
    lambdas: str | Iterable[float | str | Lambda] | Schedule,
    evaluators: Sequence[Evaluator],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    figure: bool = True,
) -> SweepResult | None:
    """Run `pa_fast.sweep` on the ranks of `lm`. All ranks must call this function. It returns the
    result on rank 0 and None on the others.

    A point fails if its evaluator fails on any rank, or if two ranks return different scores. An
    evaluator must make the same requests on every rank.

    Args:
        lm: an engine with `ranks`, such as `pa_fast.engines.tensor_parallel.load(...)`.
        lambdas, evaluators, out, overwrite, progress, figure: see `pa_fast.sweep`; only
            rank 0 uses the last four.

    Raises:
        EngineError: the evaluators of the ranks differ, or a rank is gone.
        PaFastError: as `pa_fast.sweep`; on all ranks if one fails.
    """
    ranks = lm.ranks
    schedule = Schedule.of(lambdas)
    distinct_evaluators = distinct(evaluators)
    schedule = schedule.resolved([evaluator.name for evaluator in distinct_evaluators])
    ranks.agree("the schedule", [lam.key for lam in schedule.points])
    ranks.agree(
        "the evaluators",
        {evaluator.name: dict(evaluator.identity) for evaluator in distinct_evaluators},
    )
    check_reach(lm, schedule.points)
    notes = check_evaluators(lm, distinct_evaluators, schedule)
    in_step = {evaluator.name: _InStep(evaluator, ranks) for evaluator in distinct_evaluators}
    recording: Recording | None = None
    with contextlib.ExitStack() as stack:
        with ranks.step("opening the run folder"):
            if ranks.rank == 0:
                now = describe(lm, schedule, distinct_evaluators)
                recording = stack.enter_context(
                    Recording(out, schedule, now, overwrite=overwrite, progress=progress)
                )
                for note in notes:
                    recording.progress.noted(note)
        repeats = Repeats(recording.scored() if recording is not None else ())
        for visited, (lam, names, checksum) in enumerate(_all_missing(ranks, recording)):
            queue = [
                in_step[name]
                for name in ranks.broadcast(
                    "the evaluators that are left", repeats.remaining(names)
                )
            ]
            for record in visit(
                lm,
                lam,
                queue,
                checksum,
                recording.progress if recording else None,
                merge_again=visited % MERGED_EVERY == 0,
            ):
                with ranks.step("recording"):
                    if recording is not None:
                        note_repeat(repeats, recording, recording.record(record))
    return None if recording is None else finished(recording, figure)


def _all_missing(
    ranks: Any, recording: Recording | None
) -> Iterator[tuple[Lambda, list[str], int | None]]:
    """Yield on every rank each λ with its evaluators that are not finished and its recorded
    checksum, then those of the λ that the schedule adds. Rank 0 alone has the recording."""
    is_more = True
    while is_more:
        missing = None
        if recording is not None:
            missing = [(lam, names, recording.checksum(lam)) for lam, names in recording.missing()]
        yield from ranks.broadcast("the missing points", missing)
        with ranks.step("choosing the next λ"):
            more = recording is not None and recording.extend()
        is_more = ranks.broadcast("whether λ were added", more)


def run(job: SweepSpec, progress: Progress | None = None) -> SweepResult | None:
    """Run `job` on one model that the ranks of torchrun hold together; see `sweep`."""
    out = pathlib.Path(os.path.abspath(job.out))
    check_folder(out)
    schedule = job.schedule()
    model, evaluators = opened(job, schedule.points)
    return sweep(model, schedule, evaluators, out, overwrite=job.overwrite, progress=progress)


class _InStep(CompleteEvaluator):
    """An evaluator that returns on all ranks, or fails on all of them."""

    def __init__(self, evaluator: Evaluator, ranks: Any):
        self.name, self.higher_is_better = evaluator.name, evaluator.higher_is_better
        self._evaluator, self._ranks = evaluator, ranks

    def __call__(self, engine: Engine) -> Score:
        with self._ranks.step(f"the end of `{self.name}` at λ = {engine.weights.lam}", wait=True):
            score = self._evaluator(engine)
        self._ranks.agree(
            f"the score of `{self.name}`",
            (getattr(score, "value", None), getattr(score, "n", None)),
        )
        return score

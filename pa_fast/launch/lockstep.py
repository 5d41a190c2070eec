"""Sweeps by ranks that hold one model together: all run the same evaluators in lockstep, and rank 0
alone records.

Evaluators may use the model in any way, also without the engine, because every rank does the same
at the same time.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pa_fast.base import CompleteEvaluator, Engine, Evaluator, Lambda, Score
from pa_fast.run import SweepSpec, opened
from pa_fast.sweep import schedule
from pa_fast.sweep.driver import Repeats, check_evaluators, distinct, finished, note_repeat
from pa_fast.sweep.journal import check_folder
from pa_fast.sweep.manifest import describe
from pa_fast.sweep.point import MERGED_EVERY, check_reach, visit
from pa_fast.sweep.recording import Recording

if TYPE_CHECKING:
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


def sweep(
    lm: Any,
    lambdas: str | Iterable[float | str | Lambda],
    evaluators: Sequence[Evaluator],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    figure: bool = True,
) -> SweepResult | None:
    """Run `pa_fast.sweep` on the ranks of `lm`, which all make this call; return the result on rank
    0, None on the others.

    A point fails where its evaluator fails on any rank, or scores differently on two. An evaluator
    must use the same requests on all of them.

    Args:
        lm: an engine with `ranks`, such as `pa_fast.engines.tensor_parallel.load(...)`.
        lambdas, evaluators, out, overwrite, progress, figure: see `pa_fast.sweep`; rank 0 alone
            uses the last four.

    Raises:
        EngineError: the ranks were given different evaluators, or one of them is gone.
        PaFastError: as `pa_fast.sweep`; on all ranks, whichever failed.
    """
    ranks = lm.ranks
    points = schedule.lambdas(lambdas)
    distinct_evaluators = distinct(evaluators)
    ranks.agree("the schedule", [lam.key for lam in points])
    ranks.agree(
        "the evaluators",
        {evaluator.name: dict(evaluator.identity) for evaluator in distinct_evaluators},
    )
    check_reach(lm, points)
    notes = check_evaluators(lm, distinct_evaluators)
    in_step = {evaluator.name: _InStep(evaluator, ranks) for evaluator in distinct_evaluators}
    recording: Recording | None = None
    missing: list[tuple[Lambda, list[str], int | None]] | None = None
    with contextlib.ExitStack() as stack:
        with ranks.step("opening the run folder"):
            if ranks.rank == 0:
                now = describe(lm, points, distinct_evaluators)
                recording = stack.enter_context(
                    Recording(out, points, now, overwrite=overwrite, progress=progress)
                )
                for note in notes:
                    recording.progress.noted(note)
                missing = [
                    (lam, names, recording.checksum(lam)) for lam, names in recording.missing()
                ]
        repeats = Repeats(recording.scored() if recording is not None else ())
        points_left = ranks.broadcast("the missing points", missing)
        for visited, (lam, names, checksum) in enumerate(points_left):
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


def run(job: SweepSpec, progress: Progress | None = None) -> SweepResult | None:
    """Run `job` on one model that the ranks of torchrun hold together; see `sweep`."""
    out = pathlib.Path(os.path.abspath(job.out))
    check_folder(out)
    model, evaluators = opened(job)
    return sweep(model, job.lambdas, evaluators, out, overwrite=job.overwrite, progress=progress)


class _InStep(CompleteEvaluator):
    """An evaluator that ends on all ranks together or fails on all of them."""

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

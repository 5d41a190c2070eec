"""`pa_fast.sweep`: a sweep of evaluators as callers give them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pa_fast.base import complete
from pa_fast.files import check_outside, path_of

# Here and now: importing that package later would bind it over the function in `pa_fast`
from pa_fast.sweep import sweep as _sweep
from pa_fast.sweep.schedule import Schedule

if TYPE_CHECKING:
    from pa_fast.base import Engine, Lambda
    from pa_fast.evals import Given
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


def sweep(
    lm: Engine,
    lambdas: str | Iterable[float | str | Lambda],
    evaluators: Given | Iterable[Given],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | object | None = None,
    figure: bool = True,
    shard: tuple[int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    objective: str | None = None,
    keep: Mapping[str, float] | None = None,
    budget: int | None = None,
    callbacks: Iterable[object] = (),
) -> SweepResult:
    """Evaluate every λ with every evaluator, verify each switch, and record each point as soon as
    it is done.

    At each λ the weights are switched in place and proven to be the merge; their checksum must
    be the same before and after every evaluator. A point whose evaluator fails, or writes to the
    weights, is recorded as failed and the sweep goes on: look at `SweepResult.failures`. The
    weights are left at the last λ that was evaluated.

    A sweep resumes by itself: call it again with the same `out`, and failed points are run again,
    finished ones are not. λ and evaluators may be added. A kill at any moment loses at most the
    running point.

    Args:
        lm: the model to sweep, `pa_fast.load(...)` or any other `Engine`.
        lambdas: as for `pa_fast.lambdas`: `"0:1:0.1"`, `"0,0.25,1/3"`, or numbers; or `"auto"`: 0,
            0.2 … 1, and then those that narrow down the best λ, 12 at most. Which they are follows
            from the scores alone, whoever evaluates them.
        evaluators: one or more, whose names differ: EVAL strings as on the command line, YAML
            suites, functions of an engine that return a number, a dict of numbers or a `Score`, and
            `Evaluator` objects.
        out: the run folder: new, empty, or that of the sweep to continue.
        overwrite: start afresh in a folder that holds another sweep. Files that no sweep writes are
            left alone.
        progress: an object that is told of every step, such as
            `pa_fast.sweep.progress.TerminalProgress()`, with one or more of the methods of
            `pa_fast.sweep.progress.Progress`; None is silent.
        figure: draw `trajectory.svg`, `.png` and `.pdf` at the end.
        shard: `(rank, world)`: evaluate `lambdas[rank::world]` alone. Processes on one or many
            hosts that are given the same arguments and a shard each fill one run folder together;
            see `pa_fast.launch.environment`.
        limit, seed: at most `limit` items, drawn with `seed`, for each EVAL string and suite entry;
            see `pa_fast.evaluator`.
        objective: the name of the evaluator whose best λ is looked for, by `"auto"` and by
            `SweepResult.answer`; the first if not given, and needed for `"auto"` with several.
        keep: evaluator → the share of its score at λ = 1 that a λ must keep to be chosen:
            `{"ifeval": 0.98}`.
        budget: most λ of `"auto"`.
        callbacks: objects with one or more of the methods `on_point(lam, lm)`, called when the
            weights hold λ; `on_score(entry)`, when a point is recorded; and `on_end(result)`. What
            they raise ends the sweep.

    Returns:
        All points of the run folder, including those of earlier calls; only the failures of this
        call.

    Example:
        lm = pa_fast.load("base", "instruct")
        result = pa_fast.sweep(lm, "0:1:0.1", "icl:tasks.jsonl,shots=5", "runs/x")
        print(result.answer().sentence)

    Raises:
        UsageError: `out` is not a path, a malformed schedule, a λ outside the range of a packed
            delta, no evaluator, two of the same name, a malformed EVAL, or an objective that is no
            evaluator.
        StatisticsError: `"auto"` with an evaluator whose items do not make up its score.
        EvaluatorError: a data file or suite is wrong.
        RunError: `out` holds another sweep or foreign files, is in use, its journal is damaged, or
            a switch gives other weights than those recorded for the same λ.
        OutputError: `out` cannot be written, or lies in a checkpoint that is swept.
        KeyboardInterrupt: after the journal is whole and `results.csv` and `results.json` hold what
            is finished.

    Cost: per λ one switch, one fresh merge streamed to verify it, and a read of the live weights
    per evaluator.
    """
    from pa_fast import evals

    out = path_of(out, "out")
    configuration = complete(lm).configuration
    check_outside(out, [configuration.get(side) for side in ("base", "instruct", "tokenizer")])
    requested = evals.evaluators(evaluators, limit=limit, seed=seed)
    return _sweep(
        lm,
        Schedule.of(lambdas, objective, keep, budget),
        requested,
        out,
        overwrite=overwrite,
        progress=progress,
        figure=figure,
        shard=shard,
        callbacks=callbacks,
    )

"""Sweeps: every evaluator at every λ, on one live copy of the weights, recorded point by point.

`pa_fast.sweep` is the function of `pa_fast.sweeping`, which hides this package; import modules with
`from pa_fast.sweep import driver`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pa_fast.base import Engine, Evaluator, Lambda
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult
    from pa_fast.sweep.schedule import Schedule

__all__ = ["sweep"]


def sweep(
    lm: Engine,
    lambdas: str | Iterable[float | str | Lambda] | Schedule,
    evaluators: Sequence[Evaluator],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | object | None = None,
    figure: bool = True,
    shard: tuple[int, int] | None = None,
    callbacks: Iterable[object] = (),
) -> SweepResult:
    """Run `pa_fast.sweep` with a list of `Evaluator` objects; see there. This part knows no EVAL
    strings."""
    from pa_fast.sweep.driver import run
    from pa_fast.sweep.entry import Shard

    part = None if shard is None else Shard(*shard)
    return run(
        lm,
        lambdas,
        evaluators,
        out,
        overwrite=overwrite,
        progress=progress,
        figure=figure,
        shard=part,
        callbacks=callbacks,
    )

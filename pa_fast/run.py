"""A specification → engines and evaluators: how a sweep on the command line becomes objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_fast.errors import EngineError
from pa_fast.evals import spec
from pa_fast.sweep.schedule import lambdas

if TYPE_CHECKING:
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


@dataclass(frozen=True)
class SweepSpec:
    """One `pa-fast sweep`, as text and numbers: everything that a process needs to run it."""

    base: str
    instruct: str
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


def run(job: SweepSpec, progress: Progress | None = None) -> SweepResult:
    """Load the pair and the evaluators that `job` names, and sweep.

    What can be wrong in the arguments or the data files fails before a model is loaded.
    """
    points = lambdas(job.lambdas)
    parsed = [spec.parse(text) for text in job.evals]
    evaluators = [spec.build(one, limit=job.limit, seed=job.seed) for one in parsed]

    from pa_fast.engines.transformers import load
    from pa_fast.sweep import sweep

    engine = load(
        job.base,
        job.instruct,
        device=job.device,
        dtype=job.dtype,
        store=job.store,
        tokenizer=job.tokenizer,
        batch_size=job.batch_size,
        allow_nonfinite=job.allow_nonfinite,
    )
    if engine.tokenizer is None:
        looked = job.tokenizer or job.instruct
        raise EngineError(f"{looked} has no tokenizer files, and evaluators need one", "pass --tokenizer with a folder that has")
    return sweep(engine, points, evaluators, job.out, overwrite=job.overwrite, progress=progress)

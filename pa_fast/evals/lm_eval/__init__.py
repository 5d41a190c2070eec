"""lm-eval (0.4.13 and later) on one live model: as an evaluator, and as parts for pipelines that
call lm-eval themselves.

`PaFastLM(engine)` is an `lm_eval.api.model.LM` whose scores are those of lm-eval's own `HFLM` on a
saved merge, at the λ that the engine holds. `build_once(tasks)` makes `evaluate()` build the
requests of `TaskManager.load(…)` only once. `PaFastVLLM(engine)` is likewise lm-eval's own `VLLM`,
around an engine of `pa_fast.vllm`:

    harness = PaFastLM(lm)
    tasks = build_once(TaskManager().load(["piqa", "arc_easy"]))
    for lam in pa_fast.lambdas("0:1:0.1"):
        lm.set_lambda(lam)
        results = evaluate(harness, tasks, bootstrap_iters=0, log_samples=False)
"""

from __future__ import annotations

import importlib
from typing import Any

from pa_fast.evals.lm_eval.cached_task import build_once
from pa_fast.evals.lm_eval.evaluator import KIND, LmEval
from pa_fast.evals.lm_eval.tasks import require_lm_eval

__all__ = ["KIND", "LmEval", "PaFastLM", "PaFastVLLM", "build_once"]


_MODELS = {"PaFastLM": "model", "PaFastVLLM": "vllm_model"}


def __getattr__(name: str) -> Any:
    """Import a model class at its first use: its base class loads lm-eval."""
    if name not in _MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_lm_eval()
    return getattr(importlib.import_module(f"pa_fast.evals.lm_eval.{_MODELS[name]}"), name)

"""lm-eval on one live model, under a short name: parts of `pa_fast.evals.lm_eval` for pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_fast.evals import lm_eval
from pa_fast.evals.lm_eval import LmEval, build_once

if TYPE_CHECKING:
    from pa_fast.evals.lm_eval import PaFastLM, PaFastVLLM

__all__ = ["LmEval", "PaFastLM", "PaFastVLLM", "build_once"]


def __getattr__(name: str) -> Any:
    """Import a model class when it is first used: its base class loads lm-eval."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(lm_eval, name)

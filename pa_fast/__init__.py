"""pa_fast: dense, exact λ sweeps along W(λ) = B + λ (I − B) between a base LLM checkpoint and its
instruct sibling.

    lm = pa_fast.load("base", "instruct")
    for lam in pa_fast.lambdas("0:1:0.1"):
        lm.set_lambda(lam)
        my_stack(lm.model)

Everything public is in `__all__`; nothing here imports torch before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pa_fast.base import Continuation, Engine, Evaluator, Generation, Item, Lambda, Score
from pa_fast.errors import PaFastError
from pa_fast.rules import LambdaRule

# Bound here and now: the function must shadow the package of the same name, whoever imports that
# package later.
from pa_fast.sweeping import sweep

if TYPE_CHECKING:
    from pa_fast.checkpoint.inspect import PairReport, inspect
    from pa_fast.checkpoint.merge import MergeReport, merge
    from pa_fast.checkpoint.verify import VerifyReport, verify
    from pa_fast.encoding import encode, export_lora
    from pa_fast.engines.model import LambdaModel
    from pa_fast.engines.transformers import load
    from pa_fast.evals.given import evaluator
    from pa_fast.live.memory import Memory
    from pa_fast.live.weights import LiveWeights
    from pa_fast.rounding import Rounding
    from pa_fast.stats.answer import Answer
    from pa_fast.stores.dense import DenseStore
    from pa_fast.stores.lowrank import LowRankStore
    from pa_fast.stores.packed import PackedStore
    from pa_fast.stores.quality import QualityReport
    from pa_fast.stores.sparse import SparseStore
    from pa_fast.sweep.results import SweepResult
    from pa_fast.sweep.schedule import lambdas

__version__ = "0.1.0"

_LAZY = {
    "DenseStore": "pa_fast.stores.dense",
    "Answer": "pa_fast.stats.answer",
    "LambdaModel": "pa_fast.engines.model",
    "LiveWeights": "pa_fast.live.weights",
    "LowRankStore": "pa_fast.stores.lowrank",
    "Memory": "pa_fast.live.memory",
    "MergeReport": "pa_fast.checkpoint.merge",
    "PackedStore": "pa_fast.stores.packed",
    "PairReport": "pa_fast.checkpoint.inspect",
    "QualityReport": "pa_fast.stores.quality",
    "Rounding": "pa_fast.rounding",
    "SparseStore": "pa_fast.stores.sparse",
    "SweepResult": "pa_fast.sweep.results",
    "VerifyReport": "pa_fast.checkpoint.verify",
    "encode": "pa_fast.encoding",
    "evaluator": "pa_fast.evals.given",
    "export_lora": "pa_fast.encoding",
    "inspect": "pa_fast.checkpoint.inspect",
    "lambdas": "pa_fast.sweep.schedule",
    "load": "pa_fast.engines.transformers",
    "merge": "pa_fast.checkpoint.merge",
    "verify": "pa_fast.checkpoint.verify",
}

__all__ = [
    "Answer",
    "Continuation",
    "DenseStore",
    "Engine",
    "Evaluator",
    "Generation",
    "Item",
    "Lambda",
    "LambdaModel",
    "LambdaRule",
    "LiveWeights",
    "LowRankStore",
    "Memory",
    "MergeReport",
    "PaFastError",
    "PackedStore",
    "PairReport",
    "QualityReport",
    "Rounding",
    "Score",
    "SparseStore",
    "SweepResult",
    "VerifyReport",
    "__version__",
    "encode",
    "evaluator",
    "export_lora",
    "inspect",
    "lambdas",
    "load",
    "merge",
    "sweep",
    "verify",
]


_MODULES = ("lm_eval", "ray", "sglang", "vllm")
"""Short names of modules for stacks that may be missing; outside of `__all__`, so that a star
import shadows none of them."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pa_fast.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pa_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

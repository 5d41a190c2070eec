"""Evaluators, and the EVAL strings of the command line that name them."""

from __future__ import annotations

from pa_fast.evals.given import Given, evaluator, evaluators
from pa_fast.evals.kind import EvalSpec
from pa_fast.evals.spec import EXAMPLES, build, parse
from pa_fast.evals.suite import parse_all

__all__ = [
    "EXAMPLES",
    "EvalSpec",
    "Given",
    "build",
    "evaluator",
    "evaluators",
    "parse",
    "parse_all",
]

"""Evaluators, and the EVAL strings of the command line that name them."""

from __future__ import annotations

from pa_fast.evals.spec import EXAMPLES, EvalSpec, build, parse

__all__ = ["EXAMPLES", "EvalSpec", "build", "parse"]

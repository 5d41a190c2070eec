"""vLLM as a live engine, under a short name: `load` and `attach` of `pa_fast.engines.vllm`."""

from __future__ import annotations

from pa_fast.engines.vllm.engine import LambdaLLM, attach, load, weight_version
from pa_fast.engines.vllm.stack import EXTENSION

__all__ = ["EXTENSION", "LambdaLLM", "attach", "load", "weight_version"]

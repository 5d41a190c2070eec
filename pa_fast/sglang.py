"""SGLang as a live engine, under a short name: `load` and `attach` of `pa_fast.engines.sglang`.

Checked against the source of SGLang 0.5.23 and against fakes; not run for real.
"""

from __future__ import annotations

from pa_fast.engines.sglang.engine import LambdaSGLang, attach, load
from pa_fast.engines.sglang.worker import LOADER

__all__ = ["LOADER", "LambdaSGLang", "attach", "load"]

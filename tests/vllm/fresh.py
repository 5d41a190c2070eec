"""Answers of unmodified vLLM engines, one after another: `python -m tests.vllm.fresh JSON OUT`."""

from __future__ import annotations

import gc
import json
import pathlib
import sys
from typing import Any


def main() -> None:
    asked, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from tests.vllm.answers import answers

    found: dict[str, Any] = {}
    for name, folder in asked["jobs"].items():
        llm = LLM(folder, **asked["options"])
        found[name] = answers(llm)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    assert not any(name.startswith(("pa_fast", "pa_kernels")) for name in sys.modules)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

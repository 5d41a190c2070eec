"""One engine by itself, in a process of its own: `python -m bench.forms.engine ENGINE BASE INSTRUCT
PROMPTS VOCABULARY OUT` writes the seconds of its start, of switches, and of scored and generated
requests."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ROUNDS, SWITCHES, NEW_TOKENS = 3, 9, 32


def main() -> None:
    name, base, instruct, prompts, vocabulary, out = sys.argv[1:]
    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    engine = _engine(name, base, instruct)
    found: dict[str, list[float]] = {"start": [time.perf_counter() - start]}
    lams = itertools.cycle((0.3, 0.6, 0.9))
    found["switch"] = _timed(SWITCHES, lambda: engine.set_lambda(next(lams)))
    found["weights"] = _timed(SWITCHES, lambda: engine.weights.set_lambda(next(lams)))
    engine.set_lambda(0.5)

    from bench.cpu.shared_prefix import items
    from pa_fast import Generation

    pairs = items(int(vocabulary))[: 4 * int(prompts)]
    found["scored"] = _timed(ROUNDS, lambda: engine.loglikelihood(pairs))
    draw = random.Random(0)
    asked = [
        [draw.randrange(3, int(vocabulary)) for _ in range(draw.randint(20, 60))]
        for _ in range(int(prompts))
    ]
    found["generated"] = _timed(ROUNDS, lambda: engine.generate(asked, Generation(NEW_TOKENS)))
    found["bytes"] = [float(engine.weights.memory().live_bytes)]
    pathlib.Path(out).write_text(json.dumps(found))
    engine.close()


def _engine(name: str, base: str, instruct: str) -> Any:
    if name == "transformers":
        import pa_fast

        return pa_fast.load(base, instruct, device="cpu", batch_size=32)
    import pa_fast.vllm

    return pa_fast.vllm.load(
        base,
        instruct,
        max_model_len=512,
        max_num_seqs=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )


def _timed(rounds: int, work: Callable[[], object]) -> list[float]:
    """Seconds of each round, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


if __name__ == "__main__":
    main()

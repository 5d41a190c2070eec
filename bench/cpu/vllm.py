"""The vLLM engine beside the transformers engine on one pair (P14): switches, scored and generated
requests, start. In an environment that has vLLM, such as that of `make vllm`; two threads each.

    PYTHONPATH=.:kernels .venv-vllm/bin/python -m bench -k vllm
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any

from bench.cases import JOBS
from bench.cpu.shared_prefix import items
from bench.run import Run, Skip
from bench.synthetic import SIZES, write_pair
from pa_fast.throughput.harness import Way, format_large

CASE = JOBS["vllm"]
NEW_TOKENS = 32
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm(run: Run) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed; `make vllm` makes an environment that has it")
    os.environ.update(ENVIRONMENT)
    import pa_fast.vllm

    size, count = CASE.size
    pair = write_pair(run.folder, size)
    loaded: dict[str, tuple[Any, float]] = {}
    loads: dict[str, Callable[[], Any]] = {
        "transformers": lambda: pa_fast.load(*pair, device="cpu", batch_size=32),
        "vllm": lambda: pa_fast.vllm.load(
            *map(str, pair),
            max_model_len=512,
            max_num_seqs=64,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        ),
    }
    for name, load in loads.items():
        start = time.perf_counter()
        loaded[name] = load(), time.perf_counter() - start
    hf, lm = loaded["transformers"][0], loaded["vllm"][0]
    weights = format_large(lm.weights.memory().live_bytes // 2)
    run.note(
        f"start of the engine, {weights} bf16 weights:"
        f" {loaded['transformers'][1]:.1f} s with transformers, {loaded['vllm'][1]:.1f} s with"
        " vLLM, imports and proofs included"
    )
    _switches(run, hf, lm, weights)
    pairs = items(SIZES[size][-1])[: 4 * count]
    _requests(
        run,
        f"{len(pairs)} continuations of {len(pairs) // 4} prompts of about 260 tokens, {weights}",
        lambda engine: engine.loglikelihood(pairs),
        hf,
        lm,
    )
    draw = random.Random(0)
    prompts = [
        [draw.randrange(3, SIZES[size][-1]) for _ in range(draw.randint(20, 60))]
        for _ in range(count)
    ]
    config = pa_fast.Generation(NEW_TOKENS)
    _requests(
        run,
        f"{count} prompts of 20 to 60 tokens, {NEW_TOKENS} new tokens each, {weights}",
        lambda engine: engine.generate(prompts, config),
        hf,
        lm,
    )
    lm.close()


def _switches(run: Run, hf: Any, lm: Any, weights: str) -> None:
    lams = itertools.cycle((0.3, 0.6, 0.9))
    ways = CASE.time(
        Way("transformers, set_lambda", lambda: hf.set_lambda(next(lams))),
        Way("vLLM, parameters alone", lambda: lm.weights.set_lambda(next(lams))),
        Way(
            "vLLM, set_lambda",
            lambda: lm.set_lambda(next(lams)),
            note="with the check of parameters, reset of caches, and a checksum for its outputs",
        ),
        Way("transformers, set_lambda, again", lambda: hf.set_lambda(next(lams))),
    )
    beside = ways["vLLM, set_lambda"].median_s - ways["transformers, set_lambda"].median_s
    run.record(
        CASE.target,
        f"switch of {weights} bf16 weights in vLLM",
        ways.values(),
        "transformers, set_lambda",
        goal=CASE.goal,
        headline=f"{beside * 1000:.0f} ms beside the transformers engine's switch",
    )


def _requests(run: Run, what: str, work: Callable[[Any], object], hf: Any, lm: Any) -> None:
    for engine in (hf, lm):
        engine.set_lambda(0.5)
    ours, theirs = Way("vLLM", lambda: work(lm)), Way("transformers", lambda: work(hf))
    ways = CASE.time(theirs, ours, ours.repeated, warm=1)
    ratio = ways[theirs.name].median_s / ways[ours.name].median_s
    run.record(
        CASE.target,
        what,
        ways.values(),
        ours.name,
        goal=CASE.goal,
        headline=f"{ratio:.1f} × the transformers engine",
    )

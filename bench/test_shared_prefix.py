"""In-context learning, 8 shots and 4 answers: prompts computed once, against the plain path and lm-eval's HFLM.

`PA_FAST_BENCH_ITEMS=100` for the row in the table of promises; 24 items and about 4 minutes by default. Answers have 2 to 5
tokens: those of one token cost HFLM one pass per prompt, too.
"""

from __future__ import annotations

import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import pa_fast
from bench.synthetic import SIZES, write_pair
from pa_fast.engines import scoring

ITEMS, SHOTS, ANSWERS, BATCH = int(os.environ.get("PA_FAST_BENCH_ITEMS", "24")), 8, 4, 8
ROUNDS = int(os.environ.get("PA_FAST_BENCH_ROUNDS", "3"))
Pairs = list[tuple[list[int], list[int]]]


def items(vocabulary: int) -> Pairs:
    """Each item with 8 shots of its own from a pool of 200, as token ids."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    pool = [ids(20, 32) + ids(2, 5) for _ in range(200)]
    prompts = [sum(draw.sample(pool, SHOTS), [1]) + ids(20, 32) for _ in range(ITEMS)]
    return [(prompt, ids(2, 5)) for prompt in prompts for _ in range(ANSWERS)]


def test_shared_prefix(benchmark: Any, capsys: Any, tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(*write_pair(tmp_path, "100m"), dtype="float32", batch_size=BATCH)
    lm.set_lambda(0.5)
    pairs = items(SIZES["100m"][3])
    ways: dict[str, Callable[[], list[Any]]] = {
        "shared prefix": lambda: lm.loglikelihood(pairs),
        "plain path": lambda: scoring.loglikelihood(lm.model, pairs, BATCH),
        "lm-eval HFLM": harness(lm, pairs),
    }
    ways["shared prefix again"] = ways["shared prefix"]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
    values = {name: [float(getattr(x, "logprob", None) or x[0]) for x in answers] for name, answers in found.items() if answers}
    worst = {name: max(abs(a - b) for a, b in zip(values["shared prefix"], other)) for name, other in values.items()}
    assert all(chosen(other, pairs) == chosen(values["shared prefix"], pairs) for other in values.values()), "wrong: no speed"
    assert max(worst.values()) < 1e-4, worst  # another context moves them by 1e-3 to 1e-2
    medians = {name: statistics.median(taken) for name, taken in seconds.items() if name in values}
    size = lm.weights.memory().live_bytes / 4e6
    prompt = statistics.mean(len(context) for context, _ in pairs)
    with capsys.disabled():
        print(f"\n{ITEMS} items of {prompt:.0f} tokens, {ANSWERS} answers each, batch {BATCH}, {size:.0f} M fp32 weights,")
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {ROUNDS}:")
        for name, value in medians.items():
            ratio = value / medians["shared prefix"]
            print(f"  {name:20} {value:7.2f} s  {ratio:5.2f} × the shared prefix  scores within {worst[name]:.1e} nats")
    benchmark.extra_info |= medians
    benchmark.pedantic(ways["shared prefix"], rounds=1)


def chosen(values: Sequence[float], pairs: Pairs) -> list[int]:
    """The likeliest answer per token of each item."""
    each = [value / len(answer) for value, (_, answer) in zip(values, pairs)]
    return [max(range(ANSWERS), key=lambda k: each[start + k]) for start in range(0, len(each), ANSWERS)]


def harness(lm: pa_fast.LambdaModel, pairs: Pairs) -> Callable[[], list[Any]]:
    """lm-eval's own scoring of the same tokens by the same model; nothing where lm-eval is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return list
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(SIZES["100m"][3])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    )
    hflm = HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=BATCH, max_length=4096)
    asked = [(("", str(n)), context, answer) for n, (context, answer) in enumerate(pairs)]
    return lambda: hflm._loglikelihood_tokens(asked, disable_tqdm=True)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()

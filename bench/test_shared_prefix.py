"""In-context learning, 8 shots and 4 answers (P11): prompts computed once, against the plain path
and lm-eval's HFLM.

Answers have 2 to 5 tokens: those of one token cost HFLM one pass per prompt, too.
"""

from __future__ import annotations

import pathlib
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pa_fast
from bench.cases import JOBS, asked_size
from bench.synthetic import SIZES, write_pair
from bench.table import counted, record, timed
from pa_fast.engines import scoring

CASE, SHOTS, ANSWERS, BATCH = JOBS["icl"], 8, 4, 8
PAIR = "tiny" if asked_size() == "tiny" else "100m"
Pairs = list[tuple[list[int], list[int]]]


def items(vocabulary: int) -> Pairs:
    """Each item with 8 shots of its own from a pool of 200, as token ids."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    pool = [ids(20, 32) + ids(2, 5) for _ in range(200)]
    prompts = [sum(draw.sample(pool, SHOTS), [1]) + ids(20, 32) for _ in range(CASE.size)]
    return [(prompt, ids(2, 5)) for prompt in prompts for _ in range(ANSWERS)]


def test_shared_prefix(benchmark: Any, tmp_path: pathlib.Path) -> None:
    lm = pa_fast.load(
        *write_pair(tmp_path, PAIR), device="cpu", dtype=CASE.dtypes[0], batch_size=BATCH
    )
    lm.set_lambda(0.5)
    pairs = items(SIZES[PAIR][-1])
    runs: dict[str, Callable[[], list[Any]]] = {
        "plain path": lambda: scoring.loglikelihood(lm.model, pairs, BATCH),
        "shared prefix": lambda: lm.loglikelihood(pairs),
        "shared prefix, again": lambda: lm.loglikelihood(pairs),
    }
    found: dict[str, list[float]] = {}

    def kept(name: str) -> Callable[[], None]:
        def run() -> None:
            found[name] = [float(getattr(x, "logprob", None) or x[0]) for x in runs[name]()]

        return run

    ways = timed({name: kept(name) for name in runs}, CASE.rounds_here, warm=False)
    peer = harness(lm, pairs)
    if peer is not None:  # four times as long as ours, and no part of the goal
        runs["lm-eval HFLM"] = peer
        (once,) = timed({"lm-eval HFLM": kept("lm-eval HFLM")}, 1, warm=False)
        ways.append(replace(once, note="one round"))
    best = chosen(found["shared prefix"], pairs)
    assert all(chosen(values, pairs) == best for values in found.values()), (
        "other answers: no speed"
    )
    worst = max(
        abs(a - b) for values in found.values() for a, b in zip(found["shared prefix"], values)
    )
    assert worst < 1e-4, worst  # another context moves them by 1e-3 to 1e-2
    plain, ours, again, *theirs = ways
    count, prompt = (
        lm.weights.memory().live_bytes // 4,
        statistics.mean(len(context) for context, _ in pairs),
    )
    beside = "".join(f", {way.median_s / ours.median_s:.1f} × {way.name}" for way in theirs)
    record(
        benchmark,
        CASE.target,
        f"icl, {CASE.size} items of {prompt:.0f} tokens, {counted(count)} fp32 weights",
        ways,
        against=ours.name,
        goal=CASE.goal,
        noise=(ours.name, again.name),
        headline=(
            f"{plain.median_s / ours.median_s:.1f} × the plain path{beside}; scores within"
            f" {worst:.0e} nats"
        ),
    )


def chosen(values: Sequence[float], pairs: Pairs) -> list[int]:
    """The likeliest answer per token of each item."""
    each = [value / len(answer) for value, (_, answer) in zip(values, pairs)]
    return [
        max(range(ANSWERS), key=lambda k: each[start + k]) for start in range(0, len(each), ANSWERS)
    ]


def harness(lm: pa_fast.LambdaModel, pairs: Pairs) -> Callable[[], list[Any]] | None:
    """lm-eval's own scoring of the same tokens by the same model; None where lm-eval is not
    installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return None
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(SIZES[PAIR][-1])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w2",
        pad_token="w0",
    )
    hflm = HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=BATCH, max_length=4096)
    asked = [(("", str(n)), context, answer) for n, (context, answer) in enumerate(pairs)]
    return lambda: hflm._loglikelihood_tokens(asked, disable_tqdm=True)

"""In-context learning, 8 shots and 4 answers (P11): prompts computed once, against the plain path
and lm-eval's HFLM.

Answers have 2 to 5 tokens: those of one token cost HFLM one pass per prompt, too.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pa_fast
from bench.cases import JOBS, requested_size
from bench.run import Run
from bench.synthetic import SIZES, write_pair
from pa_fast.engines import scoring
from pa_fast.throughput.harness import Way, format_large, require_bits, timed

CASE, SHOTS, ANSWERS, BATCH = JOBS["icl"], 8, 4, 8
PAIR = "tiny" if requested_size() == "tiny" else "100m"
Pairs = list[tuple[list[int], list[int]]]


def items(vocabulary: int) -> Pairs:
    """Each item with 8 shots of its own from a pool of 200, as token ids."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    pool = [ids(20, 32) + ids(2, 5) for _ in range(200)]
    prompts = [sum(draw.sample(pool, SHOTS), [1]) + ids(20, 32) for _ in range(CASE.size)]
    return [(prompt, ids(2, 5)) for prompt in prompts for _ in range(ANSWERS)]


def shared_prefix(run: Run) -> None:
    lm = pa_fast.load(
        *write_pair(run.folder, PAIR), device="cpu", dtype=CASE.dtypes[0], batch_size=BATCH
    )
    lm.set_lambda(0.5)
    pairs = items(SIZES[PAIR][-1])
    scores: dict[str, list[float]] = {}

    def way(name: str, score: Callable[[], list[Any]], note: str = "") -> Way:
        def work() -> None:
            scores[name] = [float(getattr(x, "logprob", None) or x[0]) for x in score()]

        return Way(name, work, note=note)

    ours = way("shared prefix", lambda: lm.loglikelihood(pairs))
    plain = way("plain path", lambda: scoring.loglikelihood(lm.model, pairs, BATCH))
    ways = CASE.time(plain, ours, ours.repeated, warm=0)
    theirs = harness(lm, pairs)
    if theirs is not None:  # four times as long as ours, and no part of the goal
        ways |= timed([way("lm-eval HFLM", theirs, "one round")], 1, warm=0)
    best = chosen(scores[ours.name], pairs)
    require_bits(all(chosen(values, pairs) == best for values in scores.values()), "other answers")
    worst = max(abs(a - b) for values in scores.values() for a, b in zip(scores[ours.name], values))
    assert worst < 1e-4, worst  # another context moves them by 1e-3 to 1e-2
    count = lm.weights.memory().live_bytes // 4
    prompt = statistics.mean(len(context) for context, _ in pairs)
    ratios = {name: one.median_s / ways[ours.name].median_s for name, one in ways.items()}
    beside = f", {ratios['lm-eval HFLM']:.1f} × lm-eval HFLM" if theirs else ""
    run.record(
        CASE.target,
        f"icl, {CASE.size} items of {prompt:.0f} tokens, {format_large(count)} fp32 weights",
        ways.values(),
        ours.name,
        goal=CASE.goal,
        headline=(
            f"{ratios[plain.name]:.1f} × the plain path{beside}; scores within {worst:.0e} nats"
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
    requests = [(("", str(n)), context, answer) for n, (context, answer) in enumerate(pairs)]
    return lambda: hflm._loglikelihood_tokens(requests, disable_tqdm=True)

"""Likelihoods and greedy text from a transformers model, in batches that are the same at every λ.

Batch composition changes rounding, so requests are sorted by length once, cut into batches of a fixed size, and
padded the same way whatever the weights say.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pa_fast.base import Continuation, Generation
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, longest first, ties in the given order."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def loglikelihood(model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[Continuation]:
    """Score N (context ids, continuation ids); log-likelihoods in nats, from fp32 log-softmax of the model's logits.

    Raises:
        EngineError: an empty context or continuation, or more tokens than the model has positions for.
    """
    import torch

    for n, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise EngineError(
                f"request {n} has an empty {'continuation' if context else 'context'}", "score at least one token after one"
            )
        check_length(model, len(context) + len(continuation) - 1, f"request {n}")
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    answers: list[Continuation] = [Continuation(0.0, False)] * len(pairs)
    for batch in batches([len(context) + len(continuation) for context, continuation in pairs], batch_size):
        rows = [pairs[k][0] + pairs[k][1][:-1] for k in batch]
        # Padding stands right of everything that is scored, so a causal model never sees it.
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        first = min(len(pairs[k][0]) for k in batch) - 1
        keep = {"logits_to_keep": torch.arange(first, width, device=model.device)} if selects else {}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        if not selects:
            logits = logits[:, first:]
        for row, k in enumerate(batch):
            context, continuation = pairs[k]
            start = len(context) - 1 - first
            scores = torch.log_softmax(logits[row, start : start + len(continuation)].float(), dim=-1)
            wanted = torch.tensor(continuation, device=scores.device)
            logprob = float(scores.gather(1, wanted[:, None]).sum())
            answers[k] = Continuation(logprob, bool((scores.argmax(-1) == wanted).all()))
    return answers


def generate(model: PreTrainedModel, prompts: Sequence[list[int]], config: Generation, batch_size: int) -> list[list[int]]:
    """Greedy continuations of N prompts, without the stop token that ended them.

    Raises:
        EngineError: an empty prompt, or more tokens than the model has positions for.
    """
    import torch
    from transformers import GenerationConfig

    for n, prompt in enumerate(prompts):
        if not prompt:
            raise EngineError(f"prompt {n} is empty", "begin with at least one token, such as BOS")
        check_length(model, len(prompt) + config.max_new_tokens, f"prompt {n} with {config.max_new_tokens} new tokens")
    pad = config.stop[0] if config.stop else 0
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=config.max_new_tokens, pad_token_id=pad, eos_token_id=list(config.stop) or None
    )
    spoken: list[list[int]] = [[]] * len(prompts)
    for batch in batches([len(prompt) for prompt in prompts], batch_size):
        width = max(len(prompts[k]) for k in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[k])) + prompts[k] for k in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompts[k])) + [1] * len(prompts[k]) for k in batch], device=model.device)
        with torch.no_grad(), _only(model, greedy):
            out = model.generate(input_ids=ids, attention_mask=mask)
        for row, k in zip(out[:, width:].tolist(), batch):
            ends = [row.index(stop) for stop in config.stop if stop in row]
            spoken[k] = row[: min(ends)] if ends else row
    return spoken


@contextlib.contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Generate by `config` alone: transformers fills what a passed configuration leaves open from the model's own."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def check_length(model: PreTrainedModel, count: int, what: str) -> None:
    """Refuse what does not fit the model's positions, instead of cutting it in silence."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and count > limit:
        raise EngineError(
            f"{what} has {count} tokens; the model has positions for {limit}", "shorten it: fewer shots, a smaller window"
        )

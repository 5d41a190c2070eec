"""Likelihoods and greedy text from a transformers model, in batches that are the same at every λ.

Batch composition changes rounding, so requests are grouped by the prefixes that they share, sorted
by length, cut into batches of a fixed size and padded the same way whatever the weights say.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pa_fast.base import Continuation, Generation
from pa_fast.engines.prefix import Past, Segment, cache_argument, forest
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch
    from transformers import Cache, GenerationConfig, PreTrainedModel


_PAD = 0
"""The id of padding: every vocabulary has it, nothing attends to it, and no score reads it."""


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in batches of at most `size`, longest first, ties in the given order."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def loglikelihood(
    model: PreTrainedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    shared_prefix: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> list[Continuation]:
    """Score N (context ids, continuation ids); log-likelihoods in nats, from fp32 log-softmax of
    the model's logits.

    Args:
        shared_prefix: compute prefixes that requests have in common once; their keys and values
            are dropped when the call returns. The model must allow it, see `prefix.obstacle`.
        progress: called with (requests done, requests in all).

    Raises:
        EngineError: an empty context or continuation, or more tokens than the model has positions
            for.
    """
    longest = positions(model)
    for n, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise EngineError(
                f"request {n} has an empty {'continuation' if context else 'context'}",
                "score at least one token after one",
            )
        count = len(context) + len(continuation) - 1
        if longest is not None and count > longest:
            check_length(model, count, f"request {n}")
    rows, first = _rows(pairs)
    segments = (
        forest(rows, first)
        if shared_prefix
        else [Segment(k, 0, len(row)) for k, row in enumerate(rows)]
    )
    answers = {}
    for k, logits in _scored(model, rows, first, segments, batch_size, Past()):
        answers[k] = _judged(logits, pairs[k][1])
        if progress is not None:
            progress(len(answers), len(pairs))
    return [answers[k] for k in range(len(pairs))]


def tokens_computed(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """Return how many tokens pass through a model for N requests: without shared prefixes, and with
    them."""
    rows, first = _rows(pairs)
    pending, shared = forest(rows, first), 0
    while pending:
        segment = pending.pop()
        shared += len(segment)
        pending += segment.under
    return sum(map(len, rows)), shared


def _rows(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of each request, and the position from which on its logits count: all
    before may be shared."""
    return [context + continuation[:-1] for context, continuation in pairs], [
        len(context) - 1 for context, _ in pairs
    ]


def _scored(
    model: PreTrainedModel,
    rows: list[list[int]],
    first: list[int],
    segments: Sequence[Segment],
    size: int,
    past: Past,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each request that ends in `segments` or below them, with its logits from position
    `first` on, tokens × vocabulary."""
    last = [segment for segment in segments if not segment.under]
    for chosen in batches([len(segment) for segment in last], size):
        batch = [last[k] for k in chosen]
        start = min(first[segment.row] - segment.start for segment in batch)
        logits = _logits(model, rows, batch, start, *past.lend(batch, False, model.device))
        for row, segment in zip(logits, batch):
            yield (
                segment.row,
                row[first[segment.row] - segment.start - start : len(segment) - start],
            )
    shared = [segment for segment in segments if segment.under]
    for chosen in batches([len(segment) for segment in shared], size):
        batch = [shared[k] for k in chosen]
        cache, lent = past.lend(batch, True, model.device)
        _logits(model, rows, batch, max(map(len, batch)) - 1, cache, lent)
        kept = Past.of(cache, batch, model.config.get_text_config(decoder=True).num_hidden_layers)
        yield from _scored(
            model, rows, first, [child for segment in batch for child in segment.under], size, kept
        )
        del cache, kept  # before the next batch makes its own


def _logits(
    model: PreTrainedModel,
    rows: list[list[int]],
    batch: list[Segment],
    start: int,
    cache: Cache | None,
    lent: dict[str, Any],
) -> torch.Tensor:
    """Return the logits of R segments from their token `start` on, R × tokens × vocabulary; rows
    are padded on the right."""
    import torch

    width = max(map(len, batch))
    ids = [rows[s.row][s.start : s.stop] + [_PAD] * (width - len(s)) for s in batch]
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": torch.arange(start, width, device=model.device)} if selects else {}
    past = {} if cache is None else {str(cache_argument(model)): cache}
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids, device=model.device), **lent, **past, **keep
        ).logits
    return logits if selects else logits[:, start:]


def _judged(logits: torch.Tensor, continuation: list[int]) -> Continuation:
    """Return the log-likelihood of `continuation` under `logits`, tokens × vocabulary, and whether
    it is the greedy one."""
    import torch

    scores = torch.log_softmax(logits.float(), dim=-1)
    wanted = torch.tensor(continuation, device=scores.device)
    return Continuation(
        float(scores.gather(1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())
    )


def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: Generation,
    batch_size: int,
    progress: Callable[[int, int], object] | None = None,
) -> list[list[int]]:
    """Return greedy continuations of N prompts, without the stop token that ended them; `progress`
    as for `loglikelihood`.

    Raises:
        EngineError: `config` samples, an empty prompt, or more tokens than the model has positions
            for.
    """
    import torch
    from transformers import GenerationConfig

    config.check_greedy("the transformers engine")
    for n, prompt in enumerate(prompts):
        if not prompt:
            raise EngineError(f"prompt {n} is empty", "begin with at least one token, such as BOS")
        check_length(
            model,
            len(prompt) + config.max_new_tokens,
            f"prompt {n} with {config.max_new_tokens} new tokens",
        )
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=_PAD,
        eos_token_id=list(config.stop) or None,
    )
    spoken: list[list[int]] = [[]] * len(prompts)
    done = 0
    for batch in batches([len(prompt) for prompt in prompts], batch_size):
        width = max(len(prompts[k]) for k in batch)
        ids = torch.tensor(
            [[_PAD] * (width - len(prompts[k])) + prompts[k] for k in batch], device=model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(prompts[k])) + [1] * len(prompts[k]) for k in batch],
            device=model.device,
        )
        with torch.no_grad(), _only(model, greedy):
            out = model.generate(input_ids=ids, attention_mask=mask)
        for row, k in zip(out[:, width:].tolist(), batch):
            stops = [row.index(stop) for stop in config.stop if stop in row]
            spoken[k] = row[: min(stops)] if stops else row
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    return spoken


@contextlib.contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Generate by `config` alone: transformers fills what a passed configuration leaves open from
    the model's own."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens that `model` has positions for, None where it does not say."""
    count: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return count


def check_length(model: PreTrainedModel, count: int, what: str) -> None:
    """Raise EngineError if `count` tokens are more than the model has positions for."""
    limit = positions(model)
    if limit is not None and count > limit:
        raise EngineError(
            f"{what} has {count} tokens; the model has positions for {limit}",
            "shorten it: fewer shots, a smaller window, fewer new tokens",
        )

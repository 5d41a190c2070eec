"""PaFastLM: lm-eval's HFLM around an engine's live model. Import lazily: this loads lm-eval."""

from __future__ import annotations

import array
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from tqdm import tqdm
from transformers import PreTrainedModel

from pa_fast.base import CompleteEngine, Engine, complete
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.lm_eval.cached_task import no_cache
from pa_fast.evals.lm_eval.tasks import quiet

Request = tuple[Any, list[int], list[int]]
"""lm-eval's name of a request, its context ids, its continuation ids."""


class PaFastLM(HFLM):
    """An lm-eval LM whose scores are those of `HFLM(softmax_dtype="float32")` on a saved merge, at
    the λ that the engine holds.

    From the second call with equal requests on, nothing is encoded: batches of continuations are
    cached as tensors, other texts as token ids, in memory for as long as this object.

    Args:
        engine: one with a transformers `.model`, such as `pa_fast.load` returns. Its tokenizer is
            copied.
        batch_size: requests per forward pass, a whole number; the engine's own by default.
            Composition of batches changes rounding, so it is the same at every λ.
        bars: draw lm-eval's progress bars.
        options: of `HFLM`: `softmax_dtype`, here fp32 as in every other evaluator unless given;
            `max_length`, `add_bos_token`, `prefix_token_id`, `chat_template_args`, …

    Generated text ends where `HFLM` would end it: at the task's `until`, and at the stop tokens of
    the model's generation configuration, which are those that a merged folder has.

    Example:
        harness = pa_fast.lm_eval.PaFastLM(lm)
        lm.set_lambda(0.6)
        results = lm_eval.evaluate(harness, tasks, bootstrap_iters=0)

    Attributes:
        cut: requests so far that lost tokens on the left, to fit the model.

    Raises:
        EvaluatorError: the engine has no transformers model, or `use_cache` is given.
        UsageError: `batch_size` is not a whole number from 1.
        EngineError: the constructor of HFLM, which ties weights, replaced a live tensor.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_size: int | None = None,
        bars: bool = True,
        use_cache: Any = None,
        **options: Any,
    ):
        full = complete(engine)
        model = _transformers_model(full)
        if use_cache is not None:
            raise no_cache()
        size = full.identity.get("batch_size", 1) if batch_size is None else batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(
                f"lm-eval: batch_size={size!r}, expected a whole number from 1",
                "`auto` would probe again at every λ and batch, so round, differently; measure once"
                " and fix it",
            )
        # the model is loaded: nothing that could name code is left to load
        options["trust_remote_code"] = False
        options.setdefault("softmax_dtype", "float32")
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(engine.tokenizer),
                batch_size=size,
                **options,
            )
        engine.on_weights_changed()
        if self.backend != "causal":
            raise EvaluatorError(
                f"lm-eval: {type(model).__name__} is an encoder-decoder model",
                "only causal models are scored",
            )
        self.engine = engine
        self.cut = 0
        self._bars = bars
        self._only_encode = False
        self._token_ids: dict[Any, array.array[int]] = {}
        self._prompts: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self._known: list[tuple[list[Any], EncodedRequests]] = []

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse `use_cache` of `simple_evaluate`."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise no_cache()

    def prepare(self, requests: Sequence[Any]) -> int:
        """Encode `requests`, lm-eval's instances, as they will be scored; return how many are cut
        on the left to fit the model.

        Raises:
            EvaluatorError: the model has no positions for an answer.
        """
        self.cut = 0
        scored = [request for request in requests if request.request_type == "loglikelihood"]
        if scored:
            self._only_encode = True
            try:
                self.loglikelihood(scored, disable_tqdm=True)
            finally:
                self._only_encode = False
        prompts = [request.args for request in requests if request.request_type == "generate_until"]
        lengths = [
            int(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"])
            for _, options in prompts
        ]
        full = [length for length in lengths if length >= self.max_length]
        if full:
            raise EvaluatorError(
                f"{len(full)} of {len(prompts)} prompts ask for up to {max(full)} new tokens, and"
                f" the model has positions for {self.max_length}",
                "a task with smaller max_gen_toks, or a model with more positions",
            )
        too_long = sum(
            len(self.tok_encode(prompt)) > self.max_length - length
            for (prompt, _), length in zip(prompts, lengths)
        )
        return int(self.cut + too_long)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        key = (string, add_special_tokens)
        if key not in self._token_ids:
            # four bytes a token: a list of integers takes nine times that
            self._token_ids[key] = array.array("i", super().tok_encode(*key, **kwargs))
        return self._token_ids[key][-(left_truncate_len or 0) :].tolist()

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if left_truncate_len:
            self.cut += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
        key = (tuple(strings), padding_side, left_truncate_len, truncation)
        if key not in self._prompts:
            self._prompts[key] = super().tok_batch_encode(list(strings), *key[1:])
        ids, mask = self._prompts[key]
        return ids.clone(), mask.clone()

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        for known, encoded in self._known:
            if known == pairs:  # fast for the same objects
                return self._score(encoded, disable_tqdm)
        before = dict(self._token_ids)
        try:
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._bars)
        finally:
            self._token_ids = before  # the encoded requests hold the tokens of the pairs
        self._known.append((pairs, self._latest))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._bars)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not self._bars)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._latest = encode_requests(
            requests,
            batch_size=self.batch_size,
            max_length=self.max_length,
            share_rows=self.logits_cache,
            device=self.device,
        )
        return self._score(self._latest, disable_tqdm)

    def _score(self, encoded: EncodedRequests, disable_tqdm: bool) -> list[tuple[float, bool]]:
        self.cut += encoded.cut
        if self._only_encode:
            return [(0.0, False)] * encoded.count
        hidden = disable_tqdm or not self._bars
        with tqdm(
            total=encoded.count, disable=hidden, desc="Running loglikelihood requests"
        ) as bar:
            return encoded.score(self._model_call, self.softmax_dtype, self.device, bar)


@dataclass(frozen=True)
class Batch:
    """One forward pass: B rows of L ids, and the rows of the logits of the T tokens scored in it.

    Attributes:
        ids: (B, L), right-padded with 0.
        value_rows, greedy_rows: (T,) rows of the (B·L, vocabulary) logits that give a token's
            likelihood, and the greedy token.
        targets: (T,) the tokens themselves.
        count: number of requests that it answers.
    """

    ids: torch.Tensor
    value_rows: torch.Tensor
    greedy_rows: torch.Tensor
    targets: torch.Tensor
    count: int


@dataclass(frozen=True)
class EncodedRequests:
    """N requests for likelihoods, as batches of tensors that are the same at every λ.

    Attributes:
        groups: for each length of continuation the numbers of the k requests of that length, and
            the (k, length) positions of their tokens among those of all batches.
        count: N.
        cut: number of requests that lost tokens on the left to fit the model.
    """

    batches: tuple[Batch, ...]
    groups: tuple[tuple[list[int], torch.Tensor], ...]
    count: int
    cut: int

    def score(
        self, forward: Callable[..., torch.Tensor], dtype: Any, device: Any, bar: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, is greedy) of each request.

        Numerics: as HFLM: log-softmax of the logits at their own dtype unless `dtype` is given,
            summed at that dtype.
        """
        values, greedy = [], []
        for batch in self.batches:
            logits = forward(batch.ids.to(device, torch.long))
            likelihoods = torch.log_softmax(logits, dim=-1, dtype=dtype).flatten(0, 1)
            values.append(likelihoods[batch.value_rows, batch.targets])
            greedy.append(likelihoods[batch.greedy_rows].argmax(-1) == batch.targets)
            bar.update(batch.count)
        answers: list[tuple[float, bool]] = [(0.0, False)] * self.count
        if self.groups:
            value, is_greedy = torch.cat(values), torch.cat(greedy)
        for numbers, positions in self.groups:
            sums = value[positions].sum(-1).tolist()
            all_greedy = is_greedy[positions].all(-1).tolist()
            for number, *answer in zip(numbers, sums, all_greedy):
                answers[number] = (answer[0], answer[1])
        return answers


def encode_requests(
    requests: Sequence[Request], *, batch_size: int, max_length: int, share_rows: bool, device: Any
) -> EncodedRequests:
    """Make the batches that lm-eval's HFLM would make of `requests`; its own Collator sorts and
    groups them.

    Args:
        max_length: tokens that the model sees at once; a longer request is cut from the left.
        share_rows: requests that differ in their last token only share a row.

    Raises:
        EvaluatorError: a continuation alone is longer than `max_length`, or has no token.
    Source: lm-eval 0.4.13 `HFLM._loglikelihood_tokens`, its treatment of continuations that share a
        row but differ in length included: the likelihood is read from the left end of the longer
        one's positions, the greedy token from the right.
    """
    for _, context, continuation in requests:
        if not context or not 0 < len(continuation) <= max_length:
            raise EvaluatorError(
                f"lm-eval: a request has {len(context)} tokens of context and {len(continuation)}"
                f" of continuation; the model has positions for {max_length}",
                "an empty answer or one that is longer than the model's window cannot be scored",
            )
    collator: Any = Collator(
        requests,
        sort_fn=_longest_first,
        group_by="contexts" if share_rows else None,
        group_fn=lambda r: r[1] + r[2][:-1],
    )
    batches: list[Batch] = []
    lengths: list[int] = []
    for chunk in collator.get_batched(n=batch_size):
        rows = [
            (context + continuation)[-(max_length + 1) :][:-1] for _, context, continuation in chunk
        ]
        width = max(map(len, rows))
        value_rows, greedy_rows, targets, before = [], [], [], len(lengths)
        for index, ((name, context, continuation), row) in enumerate(zip(chunk, rows)):
            end = index * width + len(row)
            positions = torch.arange(end - len(continuation), end).view(1, -1, 1)
            for _, tokens, shared in collator.get_cache(
                req_str=name, cxt_toks=context, cont_toks=continuation, logits=positions
            ):
                value_rows.append(shared.flatten()[: len(tokens)])
                greedy_rows.append(shared.flatten()[-len(tokens) :])
                targets += tokens
                lengths.append(len(tokens))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
        columns = (torch.cat(value_rows), torch.cat(greedy_rows), torch.tensor(targets))
        scored = torch.stack(columns).to(device)
        batches.append(Batch(ids, scored[0], scored[1], scored[2], len(lengths) - before))
    order = collator.get_original(list(range(len(lengths))))
    cut = sum(
        len(context) + len(continuation) > max_length + 1 for _, context, continuation in requests
    )
    groups = _by_length(lengths, order, device)
    return EncodedRequests(tuple(batches), groups, len(requests), cut)


def _longest_first(request: Request) -> tuple[int, tuple[int, ...]]:
    tokens = request[1] + request[2]
    return -len(tokens), tuple(tokens)


def _by_length(
    lengths: list[int], order: list[int], device: Any
) -> tuple[tuple[list[int], torch.Tensor], ...]:
    """Group requests by length of continuation: sums of equal length are one operation, and each is
    what it would be alone."""
    starts = [0, *itertools.accumulate(lengths)]
    numbers: dict[int, list[int]] = defaultdict(list)
    for number, answer in enumerate(order):
        numbers[lengths[answer]].append(number)
    groups = []
    for length, members in numbers.items():
        first = torch.tensor([starts[order[number]] for number in members])
        groups.append((members, (first[:, None] + torch.arange(length)).to(device)))
    return tuple(groups)


def _transformers_model(engine: CompleteEngine) -> Any:
    model = engine.model
    if not isinstance(model, PreTrainedModel):
        given = "no `.model`" if model is None else f"a {type(model).__name__} as `.model`"
        raise EvaluatorError(
            "lm-eval needs an engine with a transformers model, and"
            f" {engine.__class__.__name__} has {given}",
            "use PaFastVLLM for an engine of vLLM, pass what pa_fast.load returns, or wrap the"
            " engine in an lm_eval.api.model.LM of your own",
        )
    return model

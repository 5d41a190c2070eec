"""Continuations to score, as batches of tensors that are the same at every λ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.errors import EvaluatorError

if TYPE_CHECKING:
    import torch

Request = tuple[Any, list[int], list[int]]
"""What the harness calls it by, its context ids, its continuation ids."""


@dataclass(frozen=True)
class Batch:
    """One forward pass: B rows of L ids, and for the T tokens scored in it where their logits are.

    Attributes:
        ids: (B, L), right-padded with 0.
        scored, spoken: (T,) rows of the (B·L, vocabulary) logits that give a token's likelihood,
            and the greedy token.
        targets: (T,) the tokens themselves.
        requests: how many requests it answers.
    """

    ids: torch.Tensor
    scored: torch.Tensor
    spoken: torch.Tensor
    targets: torch.Tensor
    requests: int


@dataclass(frozen=True)
class Plan:
    """N requests as batches.

    Attributes:
        groups: for each length of continuation: which requests have it, and (k, length) places of
            their tokens among all.
        cut: how many requests lost tokens on the left to fit the model.
    """

    batches: tuple[Batch, ...]
    groups: tuple[tuple[list[int], torch.Tensor], ...]
    count: int
    cut: int

    def score(
        self, forward: Callable[..., torch.Tensor], dtype: Any, device: Any, bar: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is greedy) of each request.

        Numerics: as HFLM: log-softmax of the logits at their own dtype unless `dtype` is given,
            summed at that dtype.
        """
        import torch

        values, greedy = [], []
        for batch in self.batches:
            logits = forward(batch.ids.to(device, torch.long))
            likelihoods = torch.log_softmax(logits, dim=-1, dtype=dtype).flatten(0, 1)
            values.append(likelihoods[batch.scored, batch.targets])
            greedy.append(likelihoods[batch.spoken].argmax(-1) == batch.targets)
            bar.update(batch.requests)
        answers: list[tuple[float, bool]] = [(0.0, False)] * self.count
        if self.groups:
            value, said = torch.cat(values), torch.cat(greedy)
        for numbers, places in self.groups:
            sums, all_said = value[places].sum(-1).tolist(), said[places].all(-1).tolist()
            for number, *answer in zip(numbers, sums, all_said):
                answers[number] = (answer[0], answer[1])
        return answers


def planned(
    requests: Sequence[Request], *, batch_size: int, max_length: int, grouped: bool, device: Any
) -> Plan:
    """The batches that lm-eval's HFLM would make of `requests`; its own Collator sorts and groups
    them.

    Args:
        max_length: tokens that the model sees at once; a longer request is cut from the left.
        grouped: requests that differ in their last token only share a row.

    Raises:
        EvaluatorError: a continuation alone is longer than `max_length`, or has no token.
    Source: lm-eval 0.4.13 `HFLM._loglikelihood_tokens`, its treatment of continuations that share a
        row but differ in length included: the likelihood is read from the left end of the longer
        one's places, the greedy token from the right.
    """
    import torch
    from lm_eval.models.utils import Collator

    for _, context, continuation in requests:
        if not context or not 0 < len(continuation) <= max_length:
            raise EvaluatorError(
                f"lm-eval: a request has {len(context)} tokens of context and {len(continuation)}"
                f" of continuation; the model has room for {max_length}",
                "an empty answer or one that is longer than the model's window cannot be scored",
            )
    collator: Any = Collator(
        requests,
        sort_fn=_longest_first,
        group_by="contexts" if grouped else None,
        group_fn=lambda r: r[1] + r[2][:-1],
    )
    batches: list[Batch] = []
    lengths: list[int] = []
    for chunk in collator.get_batched(n=batch_size):
        rows = [
            (context + continuation)[-(max_length + 1) :][:-1] for _, context, continuation in chunk
        ]
        width = max(map(len, rows))
        scored, spoken, targets, before = [], [], [], len(lengths)
        for index, ((name, context, continuation), row) in enumerate(zip(chunk, rows)):
            end = index * width + len(row)
            places = torch.arange(end - len(continuation), end).view(1, -1, 1)
            for _, tokens, found in collator.get_cache(
                req_str=name, cxt_toks=context, cont_toks=continuation, logits=places
            ):
                scored.append(found.flatten()[: len(tokens)])
                spoken.append(found.flatten()[-len(tokens) :])
                targets += tokens
                lengths.append(len(tokens))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
        at = torch.stack([torch.cat(scored), torch.cat(spoken), torch.tensor(targets)]).to(device)
        batches.append(Batch(ids, at[0], at[1], at[2], len(lengths) - before))
    order = collator.get_original(list(range(len(lengths))))
    cut = sum(
        len(context) + len(continuation) > max_length + 1 for _, context, continuation in requests
    )
    return Plan(tuple(batches), _by_length(lengths, order, device), len(requests), cut)


def _longest_first(request: Request) -> tuple[int, tuple[int, ...]]:
    tokens = request[1] + request[2]
    return -len(tokens), tuple(tokens)


def _by_length(
    lengths: list[int], order: list[int], device: Any
) -> tuple[tuple[list[int], torch.Tensor], ...]:
    """Requests by length of continuation: sums of equal length are one operation, and each is what
    it would be alone."""
    import torch

    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    found: dict[int, list[int]] = defaultdict(list)
    for number, answer in enumerate(order):
        found[lengths[answer]].append(number)
    return tuple(
        (
            numbers,
            (torch.tensor([starts[order[n]] for n in numbers])[:, None] + torch.arange(length)).to(
                device
            ),
        )
        for length, numbers in found.items()
    )

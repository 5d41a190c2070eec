"""Divergence of a lossy model from the exact merge: KL and agreement on given tokens, batch by
batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pa_fast.base import Lambda
from pa_fast.engines import endpoints, scoring
from pa_fast.stores.quality import Divergence

if TYPE_CHECKING:
    import torch

    from pa_fast.engines.model import LambdaModel

_PAD = 0  # on the right, where earlier tokens of a causal model do not attend to it


def divergence(
    exact: LambdaModel,
    lossy: LambdaModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    lam: Lambda,
    batch_size: int,
) -> Divergence:
    """Return KL(exact ‖ lossy) and top-1 agreement for each continuation token, both models at λ.

    Args:
        exact, lossy: models of one pair, both left at λ.
        pairs: (context ids, continuation ids), N ≥ 1 of them, as for `Engine.loglikelihood`.

    Numerics: fp32 log-softmax of the logits, KL summed in fp64. Equal logits give 0 and 1; a KL
    under 10⁻⁶ may be rounding.
    Cost: two forward passes per batch. Memory for both models' logits of one batch.

    Raises:
        EngineError: more tokens than the model has positions for.
    """
    import torch

    rows = [context + continuation[:-1] for context, continuation in pairs]
    for n, row in enumerate(rows):
        scoring.check_length(exact.model, len(row), f"window {n}")
    for model in (exact, lossy):
        model.set_lambda(lam)
    kl, agreed = 0.0, 0
    for batch in scoring.batches([len(row) for row in rows], batch_size):
        width = max(len(rows[k]) for k in batch)
        ids = torch.tensor([rows[k] + [_PAD] * (width - len(rows[k])) for k in batch])
        logits = [endpoints.logits(one.model, ids.to(one.model.device)) for one in (exact, lossy)]
        for index, k in enumerate(batch):
            scored = slice(len(pairs[k][0]) - 1, len(rows[k]))
            p, q = (
                torch.log_softmax(some[index, scored].to(logits[0].device).float(), dim=-1)
                for some in logits
            )
            kl += float(kl_terms(p, q).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    tokens = sum(len(continuation) for _, continuation in pairs)
    return Divergence(lam.key, kl / tokens, agreed / tokens)


def kl_terms(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return e^p (p − q) in fp64, 0 where p = −∞: tokens that a model excludes add nothing."""
    import torch

    terms = p.double().exp() * (p.double() - q.double())
    return torch.where(p == -torch.inf, 0.0, terms)

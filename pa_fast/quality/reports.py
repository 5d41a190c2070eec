"""Reports of several stores on one pair, one after another: their loss, and its effect on the model
on a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.base import Lambda
from pa_fast.engines.transformers import load
from pa_fast.errors import EngineError, EvaluatorError
from pa_fast.evals.perplexity import check_windows, windows
from pa_fast.evals.rows import read_file
from pa_fast.quality.divergence import divergence
from pa_fast.stores import registry
from pa_fast.stores.quality import OnText, QualityMeter, QualityReport
from pa_fast.stores.store import Store

if TYPE_CHECKING:
    import torch

    from pa_fast.engines.model import LambdaModel

LAMBDAS = (0.5, 1)


def reports(
    base: str | Path,
    instruct: str | Path,
    stores: Iterable[Store | str],
    text: str | Path | None = None,
    *,
    lambdas: Sequence[Any] = LAMBDAS,
    window: int = 512,
    stride: int = 256,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    allow_nonfinite: bool = False,
) -> Iterator[QualityReport]:
    """Yield the report of each store on a pair of checkpoints; with a text also KL and agreement
    with the exact merge.

    Args:
        base, instruct: local folders, or hub ids (`org/name@revision`).
        stores: names, or stores with their options.
        text: a UTF-8 file, taken as one document.
        lambdas: λ at which the models are compared.
        window, stride, batch_size: tokens that a model sees at once, tokens that each window after
            the first adds, windows per forward pass.

    Cost: with a text two live copies at once, the exact one loaded once; without, one.

    Raises:
        EvaluatorError: the text cannot be read, or has no token to score.
        UsageError: unknown store, λ, or window and stride that do not fit.
        PaFastError: as `pa_fast.load`.
    """
    points = [Lambda(lam) for lam in lambdas]
    check_windows(window, stride)
    exact = None
    if text is not None:
        read_file(text)  # fails before a model is loaded
        exact = load(
            base,
            instruct,
            device,
            dtype,
            "dense",
            batch_size=batch_size,
            allow_nonfinite=allow_nonfinite,
        )
    for store in stores:
        measured = QualityMeter(registry.named(store))
        with_store = load(
            base,
            instruct,
            device,
            dtype,
            measured.store,
            batch_size=batch_size,
            allow_nonfinite=allow_nonfinite,
        )
        report = measured.report()
        if exact is not None and text is not None:
            divergences = on_text(
                exact, with_store, text, points, window=window, stride=stride, batch_size=batch_size
            )
            report = replace(report, text=divergences)
        with_store.close()
        del with_store  # before the next one is loaded
        yield report


def on_text(
    exact: LambdaModel,
    lossy: LambdaModel,
    text: str | Path,
    lambdas: Sequence[Any] = LAMBDAS,
    *,
    window: int = 512,
    stride: int = 256,
    batch_size: int = 8,
) -> OnText:
    """Compare `lossy` with `exact` on a text at each λ. Both models are left at the last λ.

    Args:
        exact, lossy: models of one pair; the exact one's tokenizer splits the text.
        text, lambdas, window, stride, batch_size: as for `reports`.

    Raises:
        EngineError: there is no tokenizer, or a window is longer than the model allows.
        EvaluatorError, UsageError: as for `reports`.
    """
    check_windows(window, stride)
    file = read_file(text)
    if exact.tokenizer is None:
        raise EngineError(
            "the model has no tokenizer files, and a text needs one",
            "load it with tokenizer=, a folder that has",
        )
    ids = exact.tokenizer.encode(file.text, add_special_tokens=False)
    pairs = windows(ids, exact.tokenizer.bos_token_id, window, stride)
    if not pairs:
        raise EvaluatorError(f"{file.path} is too short: no token to score", "give a longer text")
    points = tuple(divergence(exact, lossy, pairs, Lambda(lam), batch_size) for lam in lambdas)
    return OnText(file.sha256, sum(len(scored) for _, scored in pairs), window, stride, points)

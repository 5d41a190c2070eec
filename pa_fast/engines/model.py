"""A model pair as one live transformers model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.base import Continuation, Generation
from pa_fast.engines import scoring
from pa_fast.engines.inventory import Inventory
from pa_fast.errors import UsageError
from pa_fast.files import path_of
from pa_fast.live.weights import LiveWeights
from pa_fast.rules import LambdaRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pa_fast.checkpoint.merge import MergeReport


class LambdaModel:
    """A transformers model whose weights follow λ. Make one with `pa_fast.load`; implements
    `pa_fast.Engine`.

    Attributes:
        model: the transformers model; its parameters are the live tensors.
        tokenizer: the tokenizer used at every λ, or None if neither folder ships one.
        weights: the `LiveWeights` behind it.
        stop_tokens: ids that end a text for either model or for the tokenizer, in order.
        notes: what loading found worth saying.
        on_progress: told (requests done, requests in all) within `loglikelihood` and `generate`;
            None, or set by a sweep.

    Warns once, through the logger `pa_fast`, where prefixes were to be shared and are not
    (`not_shared` says why), with what it costs: at the first requests that begin alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        weights: LiveWeights,
        identity: Mapping[str, Any],
        configuration: Mapping[str, Any],
        batch_size: int,
        notes: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        shared_prefix: bool = False,
        not_shared: str | None = None,
        pair: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.tokenizer: Any = tokenizer
        self.weights = weights
        self.stop_tokens = tuple(stop_tokens)
        self.identity = {
            **identity,
            "batch_size": batch_size,
            "stop_tokens": list(self.stop_tokens),
            "shared_prefix": shared_prefix,
        }
        self.configuration = dict(configuration)
        self.notes = list(notes)
        self.on_progress: Callable[[int, int], object] | None = None
        self._batch_size = batch_size
        self._not_shared = not_shared
        self._pair = pair
        self._inventory = Inventory.of(model)

    @property
    def shared_prefix(self) -> bool:
        """Whether tokens that requests begin alike with are computed once per call."""
        return bool(self.identity["shared_prefix"])

    @property
    def positions(self) -> int | None:
        """The most tokens that the model has positions for, None where its configuration does not
        say."""
        return scoring.positions(self.model)

    @property
    def lam(self) -> float | None:
        """The λ that the model holds; of a rule, its swept one."""
        return self.weights.lam

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Rewrite the model's weights in place to W(λ), and prove that the model still uses them.

        Args:
            lam: one λ for all tensors, or of the rule that was given to `load`; or a rule at its λ,
                such as `rule.at(0.6)`.
        """
        self.weights.set_lambda(lam)
        self.on_weights_changed()

    def resync(self) -> None:
        """Write every weight anew from the base, read again from its files where that is needed;
        see `LiveWeights.resync`."""
        self.weights.resync()
        self.on_weights_changed()

    @contextlib.contextmanager
    def at(self, lam: float | LambdaRule) -> Iterator[LambdaModel]:
        """`with lm.at(0.3): …` runs at λ = 0.3 and restores the previous λ, or rule."""
        before = self.weights.lam if self.weights.rule is None else self.weights.rule
        self.set_lambda(lam)
        try:
            yield self
        finally:
            if before is not None:
                self.set_lambda(before)

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score N (context ids, continuation ids); see `pa_fast.Engine`."""
        if self._not_shared is not None:
            self._warn_of_cost(pairs)
        return scoring.loglikelihood(
            self.model, pairs, self._batch_size, self.shared_prefix, self.on_progress
        )

    def _warn_of_cost(self, pairs: Sequence[tuple[list[int], list[int]]]) -> None:
        alone, shared = scoring.tokens_computed(pairs)
        if alone > shared:
            logging.getLogger("pa_fast").warning(
                "prefix sharing is off: %s. The first requests that begin alike take %s tokens"
                " through the model where %s would do (%.1f ×), at every λ",
                self._not_shared,
                f"{alone:,}",
                f"{shared:,}",
                alone / shared,
            )
            self._not_shared = None

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Greedy continuations of N prompts; see `pa_fast.Engine`."""
        return scoring.generate(self.model, prompts, config, self._batch_size, self.on_progress)

    def on_weights_changed(self) -> None:
        """Prove that the model is made of what it was made of at `load`, and of nothing else that
        could hold old weights.

        No key-value cache of `loglikelihood` or `generate` outlives the call. Waits for the device,
        so that a switch is timed whole.

        Raises:
            EngineError: a tensor, cache or module was added to the model, replaced, moved or
                removed.
        """
        self._inventory.check(self.model)
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.model.device)

    def save(
        self,
        out: str | Path,
        *,
        max_shard_size: str | int | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> MergeReport:
        """Write the live weights as a checkpoint folder `out`, as `pa_fast.merge` does at this λ:
        in instruct's names and layout, whole or not at all, with what `pa_fast.verify` goes by.

        Args:
            max_shard_size, overwrite, progress: see `pa_fast.merge`.

        Cost: one pass over the live weights, and over both sides for their fingerprints.

        Raises:
            UsageError: `out` is no path, no λ is set, or there is no instruct model whose layout
                could be taken: of a delta file, or with factors beside the layers.
            OutputError: `out` is not empty, is a source, or cannot be written.
            PairError, DataError: a source changed since it was loaded.
        """
        from pa_fast.checkpoint.merge import merge

        out = path_of(out, "out")
        lam = self.weights.lam
        if self._pair is None:
            raise UsageError(
                "the live weights of a delta file, or with factors beside the layers, are not those"
                " of a merge of two folders",
                "load the pair from its two folders, or write the model with model.save_pretrained",
            )
        if lam is None:
            raise UsageError(
                "the live weights are at no λ: a switch did not finish",
                "set_lambda, or resync, first",
            )
        self.on_weights_changed()
        rule = self.weights.rule
        return merge(
            lam=lam if rule is None else rule.lam,
            out=out,
            rule=rule,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
            model=self.model,
            **self._pair,
        )

    def __repr__(self) -> str:
        return f"<LambdaModel {type(self.model).__name__} at λ = {self.lam} on {self.model.device}>"

    def close(self) -> None:
        """Let go of the sources; the model keeps the λ it has."""
        self.weights.close()

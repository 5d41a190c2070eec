"""An engine that serves, as a model of a sweep: its proof by answers, and what it may keep of the
last λ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pa_fast.base import Continuation, Generation, Lambda
from pa_fast.engines.served.arguments import PairArguments
from pa_fast.engines.served.weights import EngineWeights, Workers
from pa_fast.errors import EngineError
from pa_fast.rules import LambdaRule

_PROMPT_TOKENS = (5, 70)
NEW_TOKENS = 8
"""Tokens that are generated to each fixed prompt."""


class ServedModel:
    """One engine whose weights follow λ; implements `pa_fast.Engine`. A subclass says how its
    engine answers, and how it drops what it keeps.

    The constructor binds the pair, unless the engine did when it loaded, and compares answers:
    those of the engine as it loaded instruct with those at λ = 1, and those after it loaded base
    with those at λ = 0: tokens and log-likelihoods, bit for bit.

    Attributes:
        engine, longest: names of the engine, and of its argument that limits a request.
        weights: the `EngineWeights` behind it.
        tokenizer: the tokenizer used at every λ.
        stop_tokens: ids that end a text for either model or for the tokenizer.
        identity, configuration: see `pa_fast.base.CompleteEngine`.
        notes: what a user should know of the loaded pair.
        on_progress: called with (requests done, requests in all) within `loglikelihood` and
            `generate`; None, or set by a sweep.

    Raises:
        EngineError: a proof failed.
    """

    engine: ClassVar[str]
    longest: ClassVar[str]
    model = None

    def __init__(self, workers: Workers, pair_arguments: PairArguments, bind: bool):
        self.on_progress: Callable[[int, int], object] | None = None
        self.tokenizer = pair_arguments.words
        self.stop_tokens = pair_arguments.stop_tokens
        self.identity: Mapping[str, Any] = pair_arguments.identity
        self.configuration: Mapping[str, Any] = {
            "base": str(pair_arguments.base.absolute()),
            "instruct": str(pair_arguments.instruct.absolute()),
            "tokenizer": str(pair_arguments.tokenizer.absolute()),
        }
        self.notes = list(pair_arguments.notes)
        self.weights = EngineWeights(workers, self.is_idle, pair_arguments.rule)
        prompts, untouched = self._fixed_prompts(), None
        if bind:
            self._drop()
            untouched = self.fixed_answers(prompts)
            self.weights.bind(pair_arguments.for_workers())
        else:
            self.weights.join()
        self.identity = {
            **self.identity,
            **{f"{side}_content": content for side, content in self.weights.content.items()},
        }
        self._compare_answers(prompts, untouched)
        self.set_lambda(0.0)

    # --- of a subclass

    @property
    def positions(self) -> int:
        """The most tokens of a request."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model knows."""
        raise NotImplementedError

    def is_idle(self) -> bool:
        """Return whether no request is unfinished."""
        raise NotImplementedError

    def reset_caches(self) -> None:
        """Drop what the engine computed with the weights of the last λ.

        Raises:
            EngineError: it keeps some.
        """
        raise NotImplementedError

    def fixed_answers(self, prompts: list[list[int]]) -> list[Any]:
        """Return tokens and log-likelihoods of `prompts`, every float: of the prompts, and of
        `NEW_TOKENS` greedy tokens to each."""
        raise NotImplementedError

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score N (context ids, continuation ids); see `pa_fast.Engine`."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Return continuations of N prompts, `config.n` of each; see `pa_fast.Engine`."""
        raise NotImplementedError

    def close(self) -> None:
        """Shut the engine down: no λ can be set any more."""
        self.weights.close()

    # --- λ

    @property
    def lam(self) -> float | None:
        """The λ that the engine's parameters hold."""
        return self.weights.lam

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Write W(λ) into the engine's parameters, and drop what was computed at the last λ.

        Raises:
            UsageError, WeightsError, EngineError: see `EngineWeights.set_lambda`.
            EngineError: see `on_weights_changed`.
        """
        self.weights.set_lambda(lam)
        self.on_weights_changed()

    def on_weights_changed(self) -> None:
        """Check that the engine's models consist of the parameters that were bound, and drop what
        it computed at the last λ. Requests from now on have a `cache_salt` of their own too.

        Raises:
            EngineError: a parameter was added, moved or removed, or the engine keeps key-value
                blocks because a request is unfinished.
        """
        self.weights.inventory()
        self._drop()

    def _drop(self) -> None:
        self.reset_caches()
        self._seen = self.weights.switches
        key = None if self.weights.lam is None else Lambda(self.weights.lam).key
        self._salt = f"λ = {key}, switch {self._seen}"

    def salt(self) -> str:
        """Return the `cache_salt` of requests at the present λ; drops caches where λ was set since
        they were dropped."""
        if self.weights.switches != self._seen:
            self.on_weights_changed()
        return self._salt

    # --- requests

    def check_requests(self, requests: Sequence[Sequence[int]]) -> None:
        """Refuse what the engine would, before others are queued beside it.

        Raises:
            EngineError: a request is empty, too long, or has an id that is no token.
        """
        for number, ids in enumerate(requests):
            if not 0 < len(ids) <= self.positions:
                raise EngineError(
                    f"request {number} has {len(ids)} tokens, and {self.engine} takes 1 to"
                    f" {self.positions}",
                    f"raise {self.longest}, or shorten the requests" if ids else "give it a token",
                )
            wrong = next((id for id in ids if not 0 <= id < self.vocabulary), None)
            if wrong is not None:
                raise EngineError(
                    f"request {number} has token id {wrong}, and the model has 0 to"
                    f" {self.vocabulary - 1}",
                    "tokenise with the tokenizer of the pair",
                )

    def check_pairs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
        """Return each context with its continuation, checked.

        Raises:
            EngineError: an empty context, or see `check_requests`.
        """
        for number, (context, _) in enumerate(pairs):
            if not context:
                raise EngineError(
                    f"request {number} has an empty context", "score after one token at least"
                )
        requests = [context + continuation for context, continuation in pairs]
        self.check_requests(requests)
        return requests

    def _fixed_prompts(self) -> list[list[int]]:
        longest = max(1, self.positions - NEW_TOKENS)
        return [
            [(31 * k + 7 * start) % (self.vocabulary - 3) + 3 for k in range(min(length, longest))]
            for start, length in enumerate(_PROMPT_TOKENS)
        ]

    def _compare_answers(self, prompts: list[list[int]], untouched: list[Any] | None) -> None:
        """Compare answers at both ends of λ with those of weights that the engine itself loaded.

        λ = 1 follows the loading of base: a copy of the weights that only loading makes, and that
        the engine multiplies, would give answers of base there.
        """
        self._drop()
        loaded = {1.0: self.fixed_answers(prompts)}
        if untouched is not None and loaded[1.0] != untouched:
            raise EngineError(
                f"{self.engine}'s answers changed when the pair was bound, with the same weights",
                "its answers depend on more than the weights: start it anew, and do not use it"
                " before the pair is bound",
            )
        if self.weights.followed is not None:
            return  # neither end of a rule is a side
        self.weights.load("base")
        self._drop()
        loaded[0.0] = self.fixed_answers(prompts)
        for lam, side in ((1.0, "instruct"), (0.0, "base")):
            self.weights.set_lambda(lam)
            self._drop()
            if self.fixed_answers(prompts) != loaded[lam]:
                raise EngineError(
                    f"{self.engine}'s answers at λ = {lam:g} are not those of {side} as"
                    f" {self.engine} loads it, though all parameters are equal",
                    "something beside the parameters holds weights: sweep this architecture with"
                    " the transformers engine",
                )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at λ = {self.lam}: {self.weights!r}>"

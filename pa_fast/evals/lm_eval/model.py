"""PaFastLM: lm-eval's HFLM around an engine's live model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from pa_fast.base import CompleteEngine, Engine, complete
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.lm_eval.installed import require_lm_eval
from pa_fast.evals.lm_eval.plan import Plan, planned
from pa_fast.evals.lm_eval.quiet import quiet
from pa_fast.evals.lm_eval.tokenizer import remembering

# HFLM, which `model_class` mixes in: lm-eval may be imported inside functions only
_Base: Any = object
_CACHE = "its key is a hash of the request alone, so that every λ would get the scores of the first"


class Live(_Base):
    """An lm-eval LM whose scores are those of `HFLM(softmax_dtype="float32")` on a saved merge, at
    the λ that the engine holds.

    From the second call with equal requests on, nothing is encoded: batches of continuations are
    kept as tensors, other texts as token ids. What a request needs stays in memory as long as this
    object.

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

    Raises:
        EvaluatorError: the engine has no transformers model, or a cache of responses is asked for.
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
            raise _no_cache()
        size = full.identity.get("batch_size", 1) if batch_size is None else batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(
                f"lm-eval: batch_size={size!r}, expected a whole number from 1",
                "`auto` would probe again at every λ and batch, so round, differently; measure once"
                " and fix it",
            )
        # the model is there: nothing that could name code is left to load
        options["trust_remote_code"] = False
        options.setdefault("softmax_dtype", "float32")
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=remembering(engine.tokenizer),
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
        """Requests so far that lost tokens on the left, to fit the model."""
        self._bars = bars
        self._planning = False
        self._plans: list[tuple[list[Any], Plan]] = []

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses `use_cache` of `simple_evaluate`."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise _no_cache()

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        asked = [request.args for request in requests]
        for known, plan in self._plans:
            if known == asked:  # the very same objects are equal at a glance
                return self._score(plan, disable_tqdm)
        with self.tokenizer.aside():
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._bars)
        self._plans.append((asked, self._latest))
        return answers

    def prepare(self, requests: Sequence[Any]) -> int:
        """Encode `requests`, lm-eval's instances, as they will be asked; returns how many are cut
        on the left to fit the model.

        Raises:
            EvaluatorError: the model has no room for an answer.
        """
        self.cut = 0
        scored = [request for request in requests if request.request_type == "loglikelihood"]
        if scored:
            self._planning = True
            try:
                self.loglikelihood(scored, disable_tqdm=True)
            finally:
                self._planning = False
        spoken = [request for request in requests if request.request_type == "generate_until"]
        lengths = [self._new_tokens(request) for request in spoken]
        full = [length for length in lengths if length >= self.max_length]
        if full:
            raise EvaluatorError(
                f"{len(full)} of {len(spoken)} prompts ask for up to {max(full)} new tokens, and"
                f" the model has positions for {self.max_length}",
                "a task with smaller max_gen_toks, or a model with more positions",
            )
        too_long = sum(
            len(self.tok_encode(r.args[0])) > self.max_length - n for r, n in zip(spoken, lengths)
        )
        return int(self.cut + too_long)

    def _new_tokens(self, request: Any) -> int:
        from lm_eval.models.utils import normalize_gen_kwargs

        return int(normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not self._bars)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not self._bars)

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        if left_truncate_len:
            self.cut += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        self._latest = planned(
            requests,
            batch_size=self.batch_size,
            max_length=self.max_length,
            grouped=self.logits_cache,
            device=self.device,
        )
        if self._planning:
            self.cut += self._latest.cut
            return [(0.0, False)] * len(requests)
        return self._score(self._latest, disable_tqdm)

    def _score(self, plan: Plan, disable_tqdm: bool) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        self.cut += plan.cut
        hidden = disable_tqdm or not self._bars
        with tqdm(total=plan.count, disable=hidden, desc="Running loglikelihood requests") as bar:
            return plan.score(self._model_call, self.softmax_dtype, self.device, bar)


@functools.cache
def model_class() -> type:
    """`PaFastLM`, a subclass of lm-eval's `HFLM`.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    return type(
        "PaFastLM", (Live, HFLM), {"__doc__": Live.__doc__, "__module__": "pa_fast.evals.lm_eval"}
    )


def _transformers_model(engine: CompleteEngine) -> Any:
    from transformers import PreTrainedModel

    model = engine.model
    if not isinstance(model, PreTrainedModel):
        found = "no `.model`" if model is None else f"a {type(model).__name__} as `.model`"
        raise EvaluatorError(
            "lm-eval needs an engine with a transformers model, and"
            f" {engine.__class__.__name__} has {found}",
            "pass what pa_fast.load returns, or wrap the engine in an lm_eval.api.model.LM of"
            " your own",
        )
    return model


def _no_cache() -> EvaluatorError:
    return EvaluatorError(
        f"lm-eval's use_cache cannot be used in a sweep: {_CACHE}",
        "leave it out; a sweep keeps its points",
    )

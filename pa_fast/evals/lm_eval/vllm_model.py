"""PaFastVLLM: lm-eval's own VLLM around an engine of vLLM that exists. Import lazily: this loads
lm-eval and vLLM."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import metadata
from typing import Any
from unittest import mock

import vllm
from lm_eval.models.utils import normalize_gen_kwargs
from vllm.platforms import current_platform

from pa_fast.base import Engine, complete
from pa_fast.errors import EvaluatorError, UsageError
from pa_fast.evals.lm_eval.cached_task import no_cache
from pa_fast.evals.lm_eval.tasks import quiet


def _version(name: str, version: Any = metadata.version) -> str:
    """The version of a distribution; of vLLM its own, which builds of other names have too."""
    return str(vllm.__version__ if name == "vllm" else version(name))


# lm-eval takes the function over as it is imported, and asks it for `vllm`. vLLM looks for its
# platform by the same function, once: before that.
assert current_platform.device_type
with mock.patch.object(metadata, "version", _version):
    from lm_eval.models import vllm_causallms


_OF_ENGINE = ("pretrained", "tokenizer", "max_model_len", "max_length", "batch_size")
"""Arguments of lm-eval's VLLM that the engine has."""


class PaFastVLLM(vllm_causallms.VLLM):
    """lm-eval's VLLM, which computes with the `.llm` of `engine` at its present λ: one engine for
    all λ, and requests tokenised once.

    Args:
        engine: one with a `vllm.LLM` as `.llm`, such as `pa_fast.vllm.load` returns.
        options: others of lm-eval's VLLM, but what its engine was started with.

    Numerics: those of lm-eval's VLLM on a merged folder, whose requests it batches alike.

    Raises:
        EvaluatorError: the engine has no `.llm`, or `use_cache` is asked for.
        UsageError: data parallel, or a LoRA adapter.
    """

    def __init__(self, engine: Engine, *, use_cache: Any = None, **options: Any):
        llm = complete(engine).llm
        if llm is None:
            raise EvaluatorError(
                f"a {type(engine).__name__} has no vLLM engine",
                "pass what pa_fast.vllm.load returns",
            )
        if use_cache is not None:
            raise no_cache()
        for name in ("data_parallel_size", "lora_local_path"):
            if options.get(name, 1) not in (1, None):
                raise UsageError(
                    f"{name}={options[name]} of lm-eval's VLLM: it would start engines of its own",
                    "leave it out; more λ at once are --workers of pa-fast sweep",
                )
        known = inspect.signature(vllm_causallms.VLLM.__init__).parameters
        odd = [name for name in options if name not in known or name in _OF_ENGINE]
        if odd:
            raise UsageError(
                f"{odd[0]}={options[odd[0]]!r} of lm-eval's VLLM: the engine runs already",
                "give arguments of vLLM to pa_fast.vllm.load",
            )
        config = llm.llm_engine.model_config
        # lm-eval's constructor always makes an engine, and finds the class by this name
        with quiet(), mock.patch.object(vllm_causallms, "LLM", lambda **_: llm):
            super().__init__(
                pretrained=str(config.model),
                tokenizer=str(config.tokenizer),
                max_model_len=int(config.max_model_len),
                batch_size="auto",
                **options,
            )
        self.engine = engine
        self.cut = 0
        self._tokens: dict[Any, list[int]] = {}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse `use_cache` of `simple_evaluate`."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise no_cache()
        super().set_cache_hook(cache_hook)

    def prepare(self, requests: Sequence[Any]) -> int:
        """Tokenise `requests`, lm-eval's instances; return how many are cut on the left to fit the
        model.

        Raises:
            EvaluatorError: the model has no positions for an answer.
        """
        self.cut = 0
        for request in requests:
            if request.request_type == "loglikelihood":
                context, continuation = request.args
                pair = (
                    self._encode_pair(context, continuation)
                    if context
                    else (
                        [self.prefix_token_id],
                        self.tok_encode(continuation),
                    )
                )
                self.cut += sum(map(len, pair)) > self.max_length - 1
            elif request.request_type == "generate_until":
                prompt, given = request.args
                length = int(normalize_gen_kwargs(given, self.max_gen_toks)["max_gen_toks"])
                if length >= self.max_length:
                    raise EvaluatorError(
                        f"lm-eval: a prompt asks for up to {length} new tokens, and vLLM has"
                        f" positions for {self.max_length}",
                        "a task with smaller max_gen_toks, or a larger max_model_len",
                    )
                self.cut += len(self.tok_encode(prompt)) > self.max_length - length
        return self.cut

    def tok_encode(self, string: Any, add_special_tokens: Any = None, **kwargs: Any) -> Any:
        if not isinstance(string, str):
            return [self.tok_encode(one, add_special_tokens, **kwargs) for one in string]
        key = (string, add_special_tokens, *sorted(kwargs.items()))
        if key not in self._tokens:
            self._tokens[key] = super().tok_encode(string, add_special_tokens, **kwargs)
        return list(self._tokens[key])

    def _model_generate(
        self, requests: Any, generate: bool = False, sampling_params: Any = None
    ) -> Any:
        if not generate or sampling_params is None:
            sampling_params = vllm_causallms.SamplingParams(
                temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False
            )
        engine: Any = self.engine
        return engine.answer(requests, sampling_params)

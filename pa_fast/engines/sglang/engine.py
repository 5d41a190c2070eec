"""The SGLang engine: a model pair in one `sglang.Engine` whose parameters follow λ in place.

Checked against the source of SGLang 0.5.23 and against fakes; not run for real.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pa_fast.base import Continuation, Generation
from pa_fast.engines.served.arguments import PairArguments, instruct_of
from pa_fast.engines.served.model import NEW_TOKENS, ServedModel
from pa_fast.engines.sglang import supported
from pa_fast.engines.sglang.worker import LOADER
from pa_fast.engines.sglang.workers import UpdateWorkers
from pa_fast.errors import EngineError, MissingExtra, UsageError, first_line
from pa_fast.rounding import Rounding
from pa_fast.rules import RuleLike
from pa_fast.stores.store import Store

_OURS = ("model_path", "tokenizer_path", "load_format", "custom_weight_loader", "server_args")
_HARMLESS = ("mem_fraction_static", "log_level", "download_dir", "dtype")
"""Arguments of SGLang that may differ between parts of one sweep; the dtype that comes of `dtype`
is recorded by itself."""

_RESOLVED = (
    *("tp_size", "max_running_requests", "chunked_prefill_size", "attention_backend"),
    *("sampling_backend", "disable_cuda_graph", "enable_deterministic_inference"),
)
"""Arguments that decide floats, which SGLang chooses where they are not given."""

_IDLE_S = 1.0
"""How long a scheduler that answered its last request may take to forget that batch."""


def load(
    base: str | Path,
    instruct: str | Path | None,
    *,
    store: str | Store = "dense",
    residency: str = "host",
    rounding: str | Rounding = "nearest",
    rule: RuleLike | None = None,
    tokenizer: str | Path | None = None,
    allow_nonfinite: bool = False,
    extra_rows: str = "instruct",
    one_sided: str | None = None,
    ignore_config: Iterable[str] = (),
    strip_prefix: str | Iterable[str] = (),
    **engine_args: Any,
) -> LambdaSGLang:
    """Start SGLang on `instruct`, bind the pair, and return the engine at λ = 0.

    Checked against the source of SGLang 0.5.23 and against fakes; not run for real.

    Args:
        base, instruct: local folders, or hub ids. Configuration, chat template and stop tokens are
            instruct's.
        store: `dense`, `packed`, or another exact store; see `LiveWeights.bind`.
        residency: where both sides lie beside SGLang's parameters: `host`, `device`, `auto`. The
            pair is bound after SGLang took memory for key-value blocks: for another than `host`
            lower `mem_fraction_static`.
        rounding, rule: see `LiveWeights.bind` and `pa_fast.load`. Tensors that SGLang fuses are
            split into those of the checkpoint, each with its own λ or noise.
        tokenizer: folder or hub id of the tokenizer for all λ; instruct's if not given.
        allow_nonfinite, extra_rows, one_sided, ignore_config, strip_prefix: see `pa_fast.load`.
        engine_args: arguments of `sglang.Engine`, such as `tp_size=2`.
            `enable_deterministic_inference` is true unless it is given.

    Example:
        lm = pa_fast.sglang.load("base", "instruct", context_length=4096)
        pa_fast.sweep(lm, "0:1:0.1", [...], "runs/first")

    Cost: SGLang's start, then two loads of each side and one of a merge, tensor by tensor, and a
        read of each side's files for their content; both sides in host memory meanwhile.

    Raises:
        CheckpointError, PairError, DataError: the folders cannot be read or do not pair.
        EngineError: SGLang cannot start, something is not supported, or a proof failed: see
            `WorkerWeights.bind` and `ServedModel`.
        UsageError: an argument is not valid.
        MissingExtra: SGLang is not installed.
    """
    _require_sglang()
    import sglang

    instruct = instruct_of("SGLang", instruct)
    for name in engine_args:
        if name in _OURS:
            raise UsageError(f"`{name}` of SGLang is set by pa_fast", "leave it out")
    pair_arguments = PairArguments.of(
        base,
        instruct,
        store=store,
        residency=residency,
        rounding=rounding,
        rule=rule,
        tokenizer=tokenizer,
        allow_nonfinite=allow_nonfinite,
        extra_rows=extra_rows,
        one_sided=one_sided,
        ignore_config=ignore_config,
        strip_prefix=strip_prefix,
    )
    pair_arguments.check_tokenizer(engine_args)
    supported.check(engine_args, pair_arguments.config)
    try:
        llm = sglang.Engine(
            **{"enable_deterministic_inference": True, **engine_args},
            model_path=str(pair_arguments.instruct),
            tokenizer_path=str(pair_arguments.tokenizer),
            load_format="safetensors",  # no pickles
            custom_weight_loader=[LOADER],
        )
    except Exception as error:
        raise EngineError(
            f"SGLang cannot start: {type(error).__name__}: {first_line(error)}",
            "sglang.Engine with the same arguments on the instruct folder shows the whole of it",
        ) from error
    try:
        return LambdaSGLang(llm, pair_arguments, engine_args)
    except BaseException:
        _shut_down(llm)
        raise


def attach(llm: Any, base: str | Path, instruct: str | Path, **options: Any) -> LambdaSGLang:
    """Bind a pair to the running engine `llm`, and return it at λ = 0.

    Checked against the source of SGLang 0.5.23 and against fakes; not run for real.

    Args:
        llm: a `sglang.Engine` that was started on the instruct folder, with
            `custom_weight_loader=[pa_fast.sglang.LOADER]`.
        base, instruct: as for `load`.
        options: those of `load` from `store` to `strip_prefix`.

    Example:
        llm = sglang.Engine(model_path=instruct, custom_weight_loader=[pa_fast.sglang.LOADER])
        lm = pa_fast.sglang.attach(llm, base, instruct)

    Raises:
        as `load`.
    """
    _require_sglang()
    pair_arguments = PairArguments.of(base, instruct, **{"residency": "host", **options})
    return LambdaSGLang(llm, pair_arguments)


class LambdaSGLang(ServedModel):
    """One engine of SGLang whose weights follow λ. Make one with `pa_fast.sglang.load` or `attach`;
    see `ServedModel` for its attributes.

    Checked against the source of SGLang 0.5.23 and against fakes; not run for real.

    Example:
        lm = pa_fast.sglang.load("base", "instruct")
        lm.set_lambda(0.6)
        lm.served.generate("1 + 1 =")  # SGLang's own calls, at λ = 0.6

    Attributes:
        served: the `sglang.Engine`.

    Raises:
        EngineError: something is not supported, or a proof failed.
    """

    engine, longest = "SGLang", "context_length"

    def __init__(
        self,
        served: Any,
        pair_arguments: PairArguments,
        engine_args: Mapping[str, Any] | None = None,
    ):
        self.served = served
        info = served.get_server_info()
        supported.check(info, pair_arguments.config)
        _check_started(info, pair_arguments)
        dtype = str(served.tokenizer_manager.model_config.dtype).removeprefix("torch.")
        super().__init__(
            UpdateWorkers(served, int(info["tp_size"]), dtype), pair_arguments, bind=True
        )
        given = {k: repr(v) for k, v in sorted((engine_args or {}).items()) if k not in _HARMLESS}
        self.identity = {
            "engine": "sglang",
            **self.identity,
            "engine_args": given,
            "sglang": info["version"],
            "dtype": dtype,
            "context_length": self.positions + 1,
            **{name: info.get(name) for name in _RESOLVED},
        }
        self.configuration = {**self.configuration, "device": str(info.get("device"))}
        self.notes += _notes(info)

    @property
    def positions(self) -> int:
        """The most tokens of a request: SGLang keeps room for one new token."""
        return int(self.served.tokenizer_manager.model_config.context_len) - 1

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model knows."""
        return int(self.served.tokenizer_manager.model_config.vocab_size)

    def is_idle(self) -> bool:
        """Return whether no request is unfinished: by SGLang's own flush, which drops nothing else.

        A paused engine may hold requests that were computed in part: it is not idle.
        """
        return not self.served.tokenizer_manager.is_pause and self._is_flushed()

    def reset_caches(self) -> None:
        """Flush SGLang's caches; see `ServedModel.reset_caches`."""
        if not self._is_flushed():
            raise EngineError(
                "SGLang could not flush the key-value blocks of the last λ: requests run or wait",
                "wait for all requests before λ is set",
            )

    def _is_flushed(self) -> bool:
        """Return whether SGLang flushed its caches. It refuses while its last batch is not yet put
        away, which may be a moment after the answer."""
        end = time.monotonic() + _IDLE_S
        while not self.served.flush_cache().success:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score N (context ids, continuation ids); see `pa_fast.Engine`.

        Raises:
            EngineError: an empty context, or a request that leaves no room for one new token.
        """
        outputs = self._answered(
            self.check_pairs(pairs),
            {"temperature": 0.0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=[len(context) - 1 for context, _ in pairs],
            top_logprobs_num=1,
        )
        return [
            self._scored(continuation, output["meta_info"])
            for (_, continuation), output in zip(pairs, outputs)
        ]

    def _scored(self, ids: Sequence[int], meta: Mapping[str, Any]) -> Continuation:
        """Return the score of `ids`, the last tokens of a prompt.

        Raises:
            EngineError: SGLang gave no score of each of them.
        """
        if not ids:
            return Continuation(0.0, True)
        steps = meta["input_token_logprobs"][-len(ids) :]
        tops = meta["input_top_logprobs"][-len(ids) :]
        last = self.vocabulary - 1
        shown = [id if id < last else 0 for id in ids]  # as SGLang shows its last token
        if [id for _, id, *_ in steps] != shown or any(
            step[0] is None or not top for step, top in zip(steps, tops)
        ):
            raise EngineError(
                f"SGLang scored other tokens than the {len(ids)} that were asked for",
                f"pa_fast was checked against SGLang {supported.CHECKED}",
            )
        return Continuation(
            float(sum(step[0] for step in steps)),
            all(step[0] >= top[0][0] for step, top in zip(steps, tops)),
        )

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Return greedy continuations of N prompts; see `pa_fast.Engine`.

        Raises:
            EngineError: `config` samples, or a prompt is empty, too long, or has an id that is no
                token.
        """
        config.check_greedy("the SGLang engine")
        self.check_requests(prompts)
        params = {
            "temperature": 0.0,
            "max_new_tokens": config.max_new_tokens,
            "stop_token_ids": list(config.stop),
            "ignore_eos": True,
        }
        return [
            [token for token in output["output_ids"] if token not in config.stop]
            for output in self._answered(prompts, params)
        ]

    def _answered(
        self, requests: Sequence[list[int]], params: Mapping[str, Any], **options: Any
    ) -> list[dict[str, Any]]:
        """Compute `requests` at the present λ, and return SGLang's outputs in their order. Each has
        the `cache_salt` of its λ.

        Raises:
            EngineError: SGLang did not answer all of them, or `on_weights_changed` failed.
        """
        if not requests:
            return []
        salt = self.salt()
        try:
            outputs: list[dict[str, Any]] = self.served.generate(
                input_ids=[list(ids) for ids in requests],
                sampling_params=dict(params),
                cache_salt=salt,
                **options,
            )
        except Exception as error:  # SGLang's own, of many kinds
            raise EngineError(
                f"SGLang did not answer: {type(error).__name__}: {first_line(error)}",
                "start the engine again, if it does not answer others either",
            ) from error
        reasons = [
            (output["meta_info"].get("finish_reason") or {}).get("type") for output in outputs
        ]
        if len(outputs) != len(requests) or "abort" in reasons:
            raise EngineError(
                f"SGLang answered {len(outputs) - reasons.count('abort')} of {len(requests)}"
                " requests",
                "nothing else may use the engine while it is swept",
            )
        if self.on_progress is not None:
            self.on_progress(len(outputs), len(outputs))
        return outputs

    def fixed_answers(self, prompts: list[list[int]]) -> list[Any]:
        """See `ServedModel.fixed_answers`. One request at a time: SGLang batches requests as they
        arrive, which rounds otherwise each time."""
        params = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        answers = []
        for prompt in prompts:
            (output,) = self._answered(
                [prompt], params, return_logprob=True, logprob_start_len=[0], top_logprobs_num=1
            )
            meta = output["meta_info"]
            names = ("input_token_logprobs", "input_top_logprobs", "output_token_logprobs")
            answers.append([output["output_ids"], *(meta[name] for name in names)])
        return answers

    def close(self) -> None:
        """See `ServedModel.close`."""
        super().close()
        _shut_down(self.served)


def _check_started(info: Mapping[str, Any], pair_arguments: PairArguments) -> None:
    """Refuse an engine that does not know our callable, or runs another model: an update would end
    its processes."""
    if LOADER not in (info.get("custom_weight_loader") or ()):
        raise EngineError(
            "this SGLang engine does not know pa_fast",
            "start it with custom_weight_loader=[pa_fast.sglang.LOADER], or use"
            " pa_fast.sglang.load",
        )
    started = Path(info["model_path"])
    if not started.is_dir() or started.resolve() != pair_arguments.instruct.resolve():
        raise EngineError(
            f"SGLang was started on {started}, and instruct is {pair_arguments.instruct}",
            "start it on the instruct folder: its configuration is that of every λ",
        )


def _notes(info: Mapping[str, Any]) -> list[str]:
    """Return what a user should know of the engine."""
    notes = [
        f"the SGLang engine was checked against the source of SGLang {supported.CHECKED} and"
        " against fakes, and has not been run for real"
    ]
    if info["version"] != supported.CHECKED:
        notes.append(f"SGLang {info['version']}: pa_fast was checked against {supported.CHECKED}")
    if not info.get("enable_deterministic_inference"):
        notes.append(
            "SGLang batches requests as they arrive: floats may differ from run to run"
            " (enable_deterministic_inference=True)"
        )
    return notes


def _require_sglang() -> None:
    try:
        import sglang  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "SGLang is not installed, or does not import here", "see https://docs.sglang.ai"
        ) from error


def _shut_down(llm: Any) -> None:
    with contextlib.suppress(Exception):
        llm.shutdown()

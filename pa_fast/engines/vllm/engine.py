"""The vLLM engine: a model pair in one engine of vLLM whose parameters follow λ in place.

Run with the CPU build of vLLM 0.32.0. The code for GPUs is the same and has not been run on one
yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pa_fast.base import Continuation, Generation, Lambda
from pa_fast.engines.served.arguments import PairArguments, instruct_of
from pa_fast.engines.served.model import NEW_TOKENS, ServedModel
from pa_fast.engines.vllm import supported
from pa_fast.engines.vllm.loader import FORMAT
from pa_fast.engines.vllm.stack import EXTENSION
from pa_fast.engines.vllm.workers import RpcWorkers
from pa_fast.errors import EngineError, MissingExtra, PaFastError, UsageError, first_line
from pa_fast.foreign import one_line
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike
from pa_fast.stores.store import Store

_OURS = ("load_format", "worker_extension_cls", "model")
_HARMLESS = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "disable_log_stats", "download_dir"),
    *("use_tqdm_on_load", "max_parallel_loading_workers", "dtype"),
)
"""Arguments of vLLM that may differ between parts of one sweep; the dtype that comes of `dtype` is
recorded by itself."""

_unclosed: dict[int, bool] = {}
"""Engines that `load` started and nothing has closed: id → whether it has a process of its own."""


def load(
    base: str | Path,
    instruct: str | Path | None,
    *,
    store: str | Store = "dense",
    residency: str = "device",
    rounding: str | Rounding = "nearest",
    rule: RuleLike | None = None,
    tokenizer: str | Path | None = None,
    allow_nonfinite: bool = False,
    extra_rows: str = "instruct",
    one_sided: str | None = None,
    ignore_config: Iterable[str] = (),
    strip_prefix: str | Iterable[str] = (),
    **engine_args: Any,
) -> LambdaLLM:
    """Start vLLM on `instruct`, bind the pair before vLLM measures its memory, and return the
    engine at λ = 0.

    Args:
        base, instruct: local folders, or hub ids. Configuration, chat template and stop tokens are
            instruct's.
        store: `dense`, `packed`, or another exact store; see `LiveWeights.bind`.
        residency: where both sides lie beside vLLM's parameters: `device`, `host`, `auto`.
        rounding, rule: see `LiveWeights.bind` and `pa_fast.load`. Tensors that vLLM fuses are split
            into those of the checkpoint, each with its own λ or noise.
        tokenizer: folder or hub id of the tokenizer for all λ; instruct's if not given.
        allow_nonfinite, extra_rows, one_sided, ignore_config, strip_prefix: see `pa_fast.load`.
        engine_args: arguments of `vllm.LLM`, such as `tensor_parallel_size=2`.

    Example:
        lm = pa_fast.vllm.load("base", "instruct", max_model_len=4096)
        pa_fast.sweep(lm, "0:1:0.1", [...], "runs/first")

    Cost: vLLM's start, then two loads of each side and one of a merge, tensor by tensor, and a read
        of each side's files for their content; both sides in host memory meanwhile.

    Raises:
        CheckpointError, PairError, DataError: the folders cannot be read or do not pair.
        EngineError: vLLM cannot start, something is not supported, or a proof failed: see
            `WorkerWeights.bind` and `LambdaLLM`.
        UsageError: an argument is not valid.
        MissingExtra: vLLM is not installed.
    """
    _require_vllm()
    from vllm import LLM

    instruct = instruct_of("vLLM", instruct)
    _check_names(engine_args)
    _check_alone()
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
    arguments = {
        **engine_args,
        "model": str(pair_arguments.instruct),
        "tokenizer": str(pair_arguments.tokenizer),
        "load_format": FORMAT,
        "worker_extension_cls": EXTENSION,
        "additional_config": {
            **engine_args.get("additional_config", {}),
            FORMAT: pair_arguments.for_workers(),
        },
    }
    _check_arguments(arguments)
    try:
        llm = LLM(**arguments)
    except PaFastError:
        raise
    except Exception as error:
        raise _of_start(error) from error
    _unclosed[id(llm)] = _has_own_process(llm)
    try:
        return LambdaLLM(llm, pair_arguments, engine_args=engine_args)
    except BaseException:
        _shut_down(llm)
        raise


def attach(llm: Any, base: str | Path, instruct: str | Path, **options: Any) -> LambdaLLM:
    """Bind a pair to the running engine `llm`, and return it at λ = 0.

    Args:
        llm: a `vllm.LLM` that was started on the instruct folder, with
            `worker_extension_cls=pa_fast.vllm.EXTENSION`. Memory beside its key-value blocks is
            needed for what the store keeps: lower its `gpu_memory_utilization`, or pass
            `residency="host"`.
        base, instruct: as for `load`.
        options: those of `load` from `store` to `strip_prefix`.

    Example:
        llm = vllm.LLM(instruct, worker_extension_cls=pa_fast.vllm.EXTENSION)
        lm = pa_fast.vllm.attach(llm, base, instruct)

    Raises:
        as `load`.
    """
    _require_vllm()
    if not hasattr(llm, "llm_engine"):
        raise UsageError(
            f"llm is a {type(llm).__name__}, expected a vllm.LLM",
            "start one on the instruct folder, or use pa_fast.vllm.load",
        )
    pair_arguments = PairArguments.of(base, instruct, **options)
    config = llm.llm_engine.vllm_config
    supported.check(config)
    started = Path(config.model_config.model)
    if not started.is_dir() or started.resolve() != pair_arguments.instruct.resolve():
        raise EngineError(
            f"vLLM was started on {started}, and instruct is {pair_arguments.instruct}",
            "start it on the instruct folder: its configuration is that of every λ",
        )
    return LambdaLLM(llm, pair_arguments, bind=True)


class LambdaLLM(ServedModel):
    """One engine of vLLM whose weights follow λ. Make one with `pa_fast.vllm.load` or `attach`; see
    `ServedModel` for its attributes.

    Example:
        lm = pa_fast.vllm.load("base", "instruct")
        lm.set_lambda(0.6)
        lm.llm.generate("1 + 1 =")  # vLLM's own calls, at λ = 0.6

    Attributes:
        llm: the `vllm.LLM`.

    Raises:
        EngineError: a proof failed.
    """

    engine, longest = "vLLM", "max_model_len"

    def __init__(
        self,
        llm: Any,
        pair_arguments: PairArguments,
        bind: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ):
        self.llm = llm
        super().__init__(RpcWorkers(llm.collective_rpc, _death_of(llm)), pair_arguments, bind)
        self.identity = {"engine": "vllm", **self.identity, **_of_engine(llm, engine_args or {})}
        device = str(llm.llm_engine.vllm_config.device_config.device_type)
        self.configuration = {**self.configuration, "device": device}
        self.notes += _of_version()

    @property
    def positions(self) -> int:
        """The most tokens of a request: vLLM keeps room for one new token."""
        return int(self.llm.llm_engine.model_config.max_model_len) - 1

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model knows."""
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """See `ServedModel.set_lambda`. vLLM's outputs carry λ and checksum as their
        `weight_version`."""
        super().set_lambda(lam)
        version = getattr(self.llm.llm_engine, "set_weight_version", None)
        if version is not None and self.weights.lam is not None:
            version(weight_version(self.weights.lam, self.weights.checksum()))

    def reset_caches(self) -> None:
        """Drop key-value blocks and encoder outputs of the last λ; see
        `ServedModel.reset_caches`."""
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                "vLLM could not drop the key-value blocks of the last λ: a request still holds"
                " some",
                "wait for all requests before λ is set",
            )
        reset_encoder = getattr(self.llm.llm_engine, "reset_encoder_cache", None)
        if reset_encoder is not None:
            reset_encoder()

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score N (context ids, continuation ids); see `pa_fast.Engine`.

        Raises:
            EngineError: an empty context, or a request that leaves no room for the one new token
                that vLLM wants.
        """
        outputs = self._run(
            self.check_pairs(pairs),
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
        )
        continuations = []
        for (context, _), output in zip(pairs, outputs):
            start = len(context)
            ids, steps = output.prompt_token_ids[start:], output.prompt_logprobs[start:]
            scored = [step[token] for token, step in zip(ids, steps)]
            continuations.append(
                Continuation(
                    float(sum(one.logprob for one in scored)), all(one.rank == 1 for one in scored)
                )
            )
        return continuations

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Return continuations of N prompts, `config.n` of each; see `pa_fast.Engine`.

        Each prompt draws by a seed of its own, made of `config.seed` and its number: vLLM's samples
        of one prompt have the seeds that follow, which are those of neighbours otherwise.

        Raises:
            EngineError: a prompt is empty, too long, or has an id that is no token.
        """
        from vllm import SamplingParams

        self.check_requests(prompts)
        chosen = [
            SamplingParams(
                n=config.n,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=_seed(config.seed, number),
                max_tokens=config.max_new_tokens,
                stop_token_ids=list(config.stop),
                ignore_eos=True,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        outputs = self.answer(prompts, chosen)
        return [
            [token for token in one.token_ids if token not in config.stop]
            for output in outputs
            for one in output.outputs
        ]

    def answer(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        """Compute `prompts` together at the present λ, and return vLLM's outputs in their order.

        Requests are all queued before the first is scheduled, so that batches are the same each
        time also where vLLM runs in a process of its own. Each has the `cache_salt` of its λ.

        Args:
            params: a `vllm.SamplingParams`, or one for each prompt.

        Raises:
            EngineError: vLLM did not answer all of them, or `on_weights_changed` failed.
        """
        if not prompts:
            return []
        salt = self.salt()
        requests = [{"prompt_token_ids": list(p), "cache_salt": salt} for p in prompts]
        with self._paused():
            self.llm.enqueue(requests, params, use_tqdm=False)
        bar: Any = False if self.on_progress is None else _bar(self.on_progress, len(requests))
        outputs: list[Any] = self.llm.wait_for_completion(use_tqdm=bar)
        if len(outputs) != len(requests):
            raise EngineError(
                f"vLLM answered {len(outputs)} of {len(requests)} requests",
                "nothing else may use the engine while it is swept",
            )
        return outputs

    def _run(self, prompts: Sequence[list[int]], **params: Any) -> list[Any]:
        from vllm import SamplingParams

        return self.answer(prompts, SamplingParams(detokenize=False, **params))

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Keep vLLM from scheduling within the block, where it runs in a process of its own."""
        if not _has_own_process(self.llm):
            yield
            return
        self.llm.sleep(level=0, mode="keep")
        try:
            yield
        finally:
            self.llm.wake_up(tags=["scheduling"])

    def is_idle(self) -> bool:
        """Return whether no request is unfinished."""
        return not self.llm.llm_engine.has_unfinished_requests()

    def close(self) -> None:
        """See `ServedModel.close`."""
        super().close()
        _shut_down(self.llm)

    def fixed_answers(self, prompts: list[list[int]]) -> list[Any]:
        """See `ServedModel.fixed_answers`."""
        greedy: dict[str, Any] = dict(max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
        scored: dict[str, Any] = dict(max_tokens=1, prompt_logprobs=0)
        return [
            [(t, step[t].logprob) for t, step in zip(one.token_ids, one.logprobs)]
            for output in self._run(prompts, temperature=0.0, **greedy)
            for one in output.outputs
        ] + [
            [
                (t, step[t].logprob, step[t].rank)
                for t, step in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
            ]
            for output in self._run(prompts, temperature=0.0, **scored)
        ]


def weight_version(lam: float | str, checksum: int | None = None) -> str:
    """Return the `weight_version` that says λ, and the checksum of the weights if it is known:
    `λ=0.6`, or `λ=0.6 checksum=00f3…`."""
    text = f"λ={Lambda(lam).key}"
    return text if checksum is None else f"{text} checksum={checksum:016x}"


def metadata_version() -> str:
    """Return the version of vLLM."""
    import vllm

    return str(vllm.__version__)


def _of_version() -> list[str]:
    """Return a note where vLLM is another release than the tested one."""
    version = metadata_version()
    if version.split("+")[0] == supported.TESTED:
        return []
    return [f"vLLM {version}: pa_fast was tested with {supported.TESTED}"]


def _require_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "vLLM is not installed, or does not import here", "see https://docs.vllm.ai"
        ) from error


def _check_alone() -> None:
    """Refuse a second engine beside one that is open, where vLLM keeps both in this process: it has
    one state for all of a process, and closing one breaks the other."""
    from vllm import envs

    if not envs.VLLM_ENABLE_V1_MULTIPROCESSING and not all(_unclosed.values()):
        raise EngineError(
            "an engine that this process started before was not closed, and vLLM holds one in a"
            " process",
            "call its close() first, start another process, or let vLLM have its own"
            " (VLLM_ENABLE_V1_MULTIPROCESSING=1)",
        )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what is not supported before anything is loaded, as far as vLLM can say it now."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(**arguments).create_engine_config()
    except Exception:
        return  # vLLM raises it again, with its own words, when it starts
    supported.check(config)


def _has_own_process(llm: Any) -> bool:
    """Whether vLLM's engine core runs in a process of its own."""
    return type(llm.llm_engine.engine_core).__name__ != "InprocClient"


def _death_of(llm: Any) -> Callable[[], bool] | None:
    """Return what says whether vLLM's own process has died; None where it has none."""
    resources: Any = getattr(llm.llm_engine.engine_core, "resources", None)
    if not _has_own_process(llm) or not hasattr(resources, "engine_dead"):
        return None
    return lambda: bool(resources.engine_dead)


def _of_start(error: Exception) -> EngineError:
    """Return what an exception of vLLM's start means."""
    return EngineError(
        f"vLLM cannot start: {type(error).__name__}: {_reason(error)}",
        "an engine that this process started before was not closed, and one that is dropped still"
        " holds its memory and its state: call its close() first, or start another process"
        if _unclosed and not callable(getattr(error, "errors", None))
        else "vllm.LLM with the same arguments on the instruct folder shows the whole of it",
    )


def _shut_down(llm: Any) -> None:
    _unclosed.pop(id(llm), None)
    with contextlib.suppress(Exception):
        llm.llm_engine.engine_core.shutdown()


def _of_engine(llm: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the floats of an engine beside the weights: every argument that was
    given, but for those of memory and logs."""
    config = llm.llm_engine.vllm_config
    return {
        "engine_args": {k: repr(v) for k, v in sorted(given.items()) if k not in _HARMLESS},
        "hf_overrides": repr(getattr(config.model_config, "hf_overrides", None) or {}),
        "vllm": metadata_version(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "enforce_eager": config.model_config.enforce_eager,
        "own_process": _has_own_process(llm),
    }


def _seed(seed: int | None, number: int) -> int | None:
    """Return the seed of prompt `number`."""
    return None if seed is None else random.Random(f"{seed} {number}").getrandbits(31)


def _check_names(given: Mapping[str, Any]) -> None:
    """Refuse arguments that vLLM does not have, and those that are not its caller's here."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {one.name for one in dataclasses.fields(EngineArgs)}
    known |= inspect.signature(LLM.__init__).parameters.keys()
    for name in given:
        if name in _OURS:
            raise UsageError(f"`{name}` of vLLM is set by pa_fast", "leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"vLLM has no argument `{name}`",
                f"did you mean {close[0]}?" if close else "see the arguments of vllm.LLM",
            )
        if name == "trust_remote_code" and given[name]:
            raise UsageError(
                "trust_remote_code=True would run code of the checkpoint", "leave it out"
            )


def _reason(error: Exception) -> str:
    """Return what an error of vLLM says, in one line: of a pydantic one the first cause."""
    causes = getattr(error, "errors", None)
    if not callable(causes):
        return first_line(error)
    try:
        cause = causes()[0]
        where = ".".join(map(str, cause.get("loc", ())))
        return one_line(f"{where}: {cause['msg']}" if where else str(cause["msg"]), 500)
    except (IndexError, KeyError, TypeError):
        return first_line(error)


def _bar(report: Callable[[int, int], object], total: int) -> Callable[..., Any]:
    """Return what vLLM makes its progress bar with: one that shows nothing, and reports."""
    from tqdm import tqdm

    class Reporting(tqdm):
        def display(self, *args: Any, **kwargs: Any) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            answer = super().update(n)
            report(min(int(self.n), total), total)
            return answer

        def close(self) -> None:
            self.disable = True

    return Reporting

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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pa_kernels.reference import CHECKSUM_VERSION

from pa_fast.base import Continuation, Generation, Lambda
from pa_fast.checkpoint.folder import check_companions, resolve
from pa_fast.checkpoint.pair import PairOptions, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import read_object
from pa_fast.engines import options
from pa_fast.engines.tokenizer import stop_tokens, tokenizer_of
from pa_fast.engines.vllm import supported
from pa_fast.engines.vllm.loader import FORMAT
from pa_fast.engines.vllm.weights import EngineWeights, Workers
from pa_fast.engines.vllm.worker_weights import EXTENSION
from pa_fast.errors import EngineError, MissingExtra, PaFastError, UsageError, first_line
from pa_fast.foreign import one_line
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike
from pa_fast.stores import registry
from pa_fast.stores.store import Store

if TYPE_CHECKING:
    from pa_fast.checkpoint.pair import Pair

_OURS = ("load_format", "worker_extension_cls", "model")
_HARMLESS = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "disable_log_stats", "download_dir"),
    *("use_tqdm_on_load", "max_parallel_loading_workers"),
)
"""Arguments of vLLM that may differ between parts of one sweep."""

_PROMPT_TOKENS = (5, 70)
_NEW_TOKENS = 8


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

    Cost: vLLM's start, then two loads of each side and one of a merge, tensor by tensor; both sides
        in host memory meanwhile.

    Raises:
        CheckpointError, PairError, DataError: the folders cannot be read or do not pair.
        EngineError: vLLM cannot start, something is not supported, or a proof failed: see
            `WorkerWeights.bind` and `LambdaLLM`.
        UsageError: an argument is not valid.
        MissingExtra: vLLM is not installed.
    """
    _require_vllm()
    from vllm import LLM

    if instruct is None:
        raise UsageError(
            "vLLM needs the instruct folder, whose configuration it starts with",
            "name INSTRUCT after BASE; a delta file cannot take its place here",
        )
    _check_names(engine_args)
    asked = PairArguments.of(
        base,
        instruct,
        store=store,
        residency=residency,
        rounding=rounding,
        rule=rule,
        tokenizer=tokenizer,
        allow_nonfinite=allow_nonfinite,
        pairing=PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix),
    )
    if asked.words is None and not engine_args.get("skip_tokenizer_init"):
        raise EngineError(
            f"{asked.tokenizer} has no tokenizer files",
            "pass tokenizer= (--tokenizer) with a folder that has, or skip_tokenizer_init=True",
        )
    arguments = {
        **engine_args,
        "model": str(asked.instruct),
        "tokenizer": str(asked.tokenizer),
        "load_format": FORMAT,
        "worker_extension_cls": EXTENSION,
        "additional_config": {
            **engine_args.get("additional_config", {}),
            FORMAT: asked.for_workers(),
        },
    }
    _check_arguments(arguments)
    try:
        llm = LLM(**arguments)
    except PaFastError:
        raise
    except Exception as error:
        raise EngineError(
            f"vLLM cannot start: {type(error).__name__}: {_reason(error)}",
            "vllm.LLM with the same arguments on the instruct folder shows the whole of it",
        ) from error
    try:
        return LambdaLLM(llm, asked, engine_args=engine_args)
    except BaseException:
        _shut_down(llm)
        raise


def attach(
    llm: Any,
    base: str | Path,
    instruct: str | Path,
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
) -> LambdaLLM:
    """Bind a pair to the running engine `llm`, and return it at λ = 0.

    Args:
        llm: a `vllm.LLM` that was started on the instruct folder, with
            `worker_extension_cls=pa_fast.vllm.EXTENSION`. Memory beside its key-value blocks is
            needed for what the store keeps: lower its `gpu_memory_utilization`, or pass
            `residency="host"`.

    The others are those of `load`.

    Example:
        llm = vllm.LLM(instruct, worker_extension_cls=pa_fast.vllm.EXTENSION)
        lm = pa_fast.vllm.attach(llm, base, instruct)

    Raises:
        as `load`.
    """
    _require_vllm()
    asked = PairArguments.of(
        base,
        instruct,
        store=store,
        residency=residency,
        rounding=rounding,
        rule=rule,
        tokenizer=tokenizer,
        allow_nonfinite=allow_nonfinite,
        pairing=PairOptions.of(extra_rows, one_sided, ignore_config, strip_prefix),
    )
    config = llm.llm_engine.vllm_config
    supported.check(config)
    started = Path(config.model_config.model)
    if not started.is_dir() or started.resolve() != asked.instruct.resolve():
        raise EngineError(
            f"vLLM was started on {started}, and instruct is {asked.instruct}",
            "start it on the instruct folder: its configuration is that of every λ",
        )
    return LambdaLLM(llm, asked, bind=True)


@dataclass(frozen=True)
class PairArguments:
    """The arguments of `load` and `attach`, checked, with the folders found and paired.

    Attributes:
        stop_tokens: ids that end a text for either side or the tokenizer.
        identity: values that must be equal for a sweep to be resumed.
        words: the tokenizer in the folder `tokenizer`, or None.
    """

    base: Path
    instruct: Path
    tokenizer: Path
    store: Store
    residency: str
    rounding: Rounding
    rule: LambdaRule | None
    allow_nonfinite: bool
    pairing: PairOptions
    notes: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    identity: Mapping[str, Any]
    words: Any

    @classmethod
    def of(
        cls,
        base: str | Path,
        instruct: str | Path,
        *,
        store: str | Store,
        residency: str,
        rounding: str | Rounding,
        rule: RuleLike | None,
        tokenizer: str | Path | None,
        allow_nonfinite: bool,
        pairing: PairOptions,
    ) -> PairArguments:
        """Return the arguments; pairs the folders by their headers."""
        followed = None if rule is None else LambdaRule.of(rule)
        rounded, held = Rounding.of(rounding), registry.named(store)
        folders = resolve(base), resolve(instruct)
        with Checkpoint.open(folders[0]) as b, Checkpoint.open(folders[1]) as i:
            check_companions(i.folder)
            paired = pair(b, i, pairing)
            if followed is not None:
                followed.touched([name for name in paired.names if paired.is_lerped(name)])
            spoken = folders[1] if tokenizer is None else resolve(tokenizer)
            words = tokenizer_of(spoken)
            identity = {
                **_identity(paired, words),
                "store": held.describe(),
                "rounding": str(rounded),
                **({} if followed is None else {"rule": followed.document()}),
            }
        return cls(
            *folders,
            spoken,
            held,
            residency,
            rounded,
            followed,
            allow_nonfinite,
            pairing,
            tuple(paired.notes),
            tuple(stop_tokens(words, _speaker(b.folder, b.config), _speaker(i.folder, i.config))),
            identity,
            words,
        )

    def for_workers(self) -> dict[str, Any]:
        """Return the argument of `WorkerWeights.bind`, of plain values."""
        return {
            "base": str(self.base.absolute()),
            "instruct": str(self.instruct.absolute()),
            "pairing": self.pairing.document(),
            "store": [self.store.name, dataclasses.asdict(self.store)],  # type: ignore[call-overload]
            "residency": self.residency,
            "rounding": str(self.rounding),
            "rule": None if self.rule is None else self.rule.document(),
            "allow_nonfinite": self.allow_nonfinite,
        }


class LambdaLLM:
    """One engine of vLLM whose weights follow λ. Make one with `pa_fast.vllm.load` or `attach`;
    implements `pa_fast.Engine`.

    Its constructor compares answers: those of the engine as vLLM loaded instruct with those at λ =
    1, and those after vLLM loaded base with those at λ = 0: tokens and log-likelihoods, bit for
    bit.

    Example:
        lm = pa_fast.vllm.load("base", "instruct")
        lm.set_lambda(0.6)
        lm.llm.generate("1 + 1 =")  # vLLM's own calls, at λ = 0.6

    Attributes:
        llm: the `vllm.LLM`.
        weights: the `EngineWeights` behind it.
        tokenizer: the tokenizer used at every λ.
        stop_tokens: ids that end a text for either model or for the tokenizer.
        notes: what a user should know of the loaded pair.
        on_progress: called with (requests done, requests in all) within `loglikelihood` and
            `generate`; None, or set by a sweep.

    Raises:
        EngineError: a proof failed.
    """

    model = None

    def __init__(
        self,
        llm: Any,
        asked: PairArguments,
        bind: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ):
        self.llm = llm
        self.on_progress: Callable[[int, int], object] | None = None
        self.tokenizer = asked.words
        self.stop_tokens = asked.stop_tokens
        self._salt = "λ of no switch"
        self._seen = 0
        workers = Workers(llm.collective_rpc, _death_of(llm))
        prompts = self._fixed_prompts()
        untouched = None
        if bind:
            self._reset_caches()
            untouched = self._answers(prompts)
            workers.call("bind", asked.for_workers())
        self.weights = EngineWeights(workers, self._is_idle, asked.rule)
        self._compare_answers(prompts, untouched)
        self.identity = {**asked.identity, **_of_engine(llm, engine_args or {})}
        self.configuration = {
            "base": str(asked.base.absolute()),
            "instruct": str(asked.instruct.absolute()),
            "tokenizer": str(asked.tokenizer.absolute()),
            "device": str(llm.llm_engine.vllm_config.device_config.device_type),
        }
        self.notes = [*asked.notes, *self._notes()]
        self.set_lambda(0.0)

    @property
    def lam(self) -> float | None:
        """The λ that vLLM's parameters hold."""
        return self.weights.lam

    @property
    def positions(self) -> int:
        """The most tokens of a request: vLLM keeps room for one new token."""
        return int(self.llm.llm_engine.model_config.max_model_len) - 1

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Write W(λ) into vLLM's parameters, drop what was computed at the last λ, and let vLLM's
        outputs carry λ and checksum as their `weight_version`.

        Raises:
            UsageError, WeightsError, EngineError: see `EngineWeights.set_lambda`.
            EngineError: see `on_weights_changed`.
        """
        self.weights.set_lambda(lam)
        self.on_weights_changed()
        version = getattr(self.llm.llm_engine, "set_weight_version", None)
        if version is not None and self.weights.lam is not None:
            version(weight_version(self.weights.lam, self.weights.checksum()))

    def on_weights_changed(self) -> None:
        """Check that vLLM's models consist of the parameters that were bound, and drop key-value
        blocks and encoder outputs of the last λ. Requests from now on have a `cache_salt` of their
        own too.

        Raises:
            EngineError: a parameter was added, moved or removed, or vLLM keeps blocks because a
                request is unfinished.
        """
        self.weights.inventory()
        self._reset_caches()

    def _reset_caches(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise EngineError(
                "vLLM could not drop the key-value blocks of the last λ: a request still holds"
                " some",
                "wait for all requests before λ is set",
            )
        reset_encoder = getattr(self.llm.llm_engine, "reset_encoder_cache", None)
        if reset_encoder is not None:
            reset_encoder()
        weights = getattr(self, "weights", None)
        self._seen = 0 if weights is None else weights.switches
        key = None if weights is None or weights.lam is None else Lambda(weights.lam).key
        self._salt = f"λ = {key}, switch {self._seen}"

    def loglikelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """Score N (context ids, continuation ids); see `pa_fast.Engine`.

        Raises:
            EngineError: an empty context, or a request that leaves no room for the one new token
                that vLLM wants.
        """
        for number, (context, continuation) in enumerate(pairs):
            if not context:
                raise EngineError(
                    f"request {number} has an empty context", "score after one token at least"
                )
            self._check(number, context + continuation)
        outputs = self._run(
            [context + continuation for context, continuation in pairs],
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
        )
        found = []
        for (context, _), output in zip(pairs, outputs):
            start = len(context)
            ids, steps = output.prompt_token_ids[start:], output.prompt_logprobs[start:]
            scored = [step[token] for token, step in zip(ids, steps)]
            found.append(
                Continuation(
                    float(sum(one.logprob for one in scored)), all(one.rank == 1 for one in scored)
                )
            )
        return found

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Return continuations of N prompts, `config.n` of each; see `pa_fast.Engine`.

        Each prompt draws by a seed of its own, made of `config.seed` and its number: vLLM's samples
        of one prompt have the seeds that follow, which are those of neighbours otherwise.

        Raises:
            EngineError: a prompt is empty, too long, or has an id that is no token.
        """
        from vllm import SamplingParams

        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
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

    def _check(self, number: int, ids: Sequence[int]) -> None:
        """Refuse a request that vLLM would, before others are queued beside it."""
        size = int(self.llm.llm_engine.model_config.get_vocab_size())
        if not 0 < len(ids) <= self.positions:
            raise EngineError(
                f"request {number} has {len(ids)} tokens, and vLLM takes 1 to {self.positions}",
                "raise max_model_len, or shorten the requests" if ids else "give it a token",
            )
        wrong = next((id for id in ids if not 0 <= id < size), None)
        if wrong is not None:
            raise EngineError(
                f"request {number} has token id {wrong}, and the model has 0 to {size - 1}",
                "tokenise with the tokenizer of the pair",
            )

    def answer(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        """Compute `prompts` together at the present λ, and return vLLM's outputs in their order.

        Requests are all queued before the first is scheduled, so that batches are the same each
        time also where vLLM runs in a process of its own. Each has the `cache_salt` of its λ.

        Args:
            params: a `vllm.SamplingParams`, or one for each prompt.

        Raises:
            EngineError: vLLM did not answer all of them, or `on_weights_changed` failed.
        """
        if self._is_stale:
            self.on_weights_changed()
        requests = [{"prompt_token_ids": list(p), "cache_salt": self._salt} for p in prompts]
        if not requests:
            return []
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

    @property
    def _is_stale(self) -> bool:
        """Whether λ was set since the caches were dropped."""
        weights = getattr(self, "weights", None)
        return weights is not None and weights.switches != self._seen

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

    def _is_idle(self) -> bool:
        return not self.llm.llm_engine.has_unfinished_requests()

    def close(self) -> None:
        """Shut the engine down."""
        _shut_down(self.llm)

    def __repr__(self) -> str:
        return f"<LambdaLLM at λ = {self.lam}: {self.weights!r}>"

    # --- proof by answers

    def _fixed_prompts(self) -> list[list[int]]:
        size = int(self.llm.llm_engine.model_config.get_vocab_size())
        longest = max(1, self.positions - _NEW_TOKENS)
        return [
            [(31 * k + 7 * start) % (size - 3) + 3 for k in range(min(length, longest))]
            for start, length in enumerate(_PROMPT_TOKENS)
        ]

    def _answers(self, prompts: list[list[int]]) -> list[Any]:
        """Return tokens and log-likelihoods of fixed prompts, every float."""
        greedy: dict[str, Any] = dict(max_tokens=_NEW_TOKENS, logprobs=0, ignore_eos=True)
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

    def _compare_answers(self, prompts: list[list[int]], untouched: list[Any] | None) -> None:
        """Compare answers at both ends of λ with those of weights that vLLM itself loaded."""
        for side, lam in (("instruct", 1.0), ("base", 0.0)):
            if side == "base":
                self.weights.load(side)
            self._reset_caches()
            loaded = self._answers(prompts)
            if side == "instruct" and untouched is not None and loaded != untouched:
                raise EngineError(
                    "vLLM's answers changed when the pair was bound, with the same weights",
                    "its answers depend on more than the weights: start it anew, and do not use it"
                    " before the pair is bound",
                )
            if self.weights.followed is not None:
                continue  # neither end of a rule is a side
            self.weights.set_lambda(lam)
            self._reset_caches()
            if self._answers(prompts) != loaded:
                raise EngineError(
                    f"vLLM's answers at λ = {lam:g} are not those of {side} as vLLM loads it,"
                    " though all parameters are equal",
                    "something beside the parameters holds weights: sweep this architecture with"
                    " the transformers engine",
                )

    def _notes(self) -> list[str]:
        version = metadata_version()
        if version.split("+")[0] == supported.TESTED:
            return []
        return [f"vLLM {version}: pa_fast was tested with {supported.TESTED}"]


def weight_version(lam: float | str, checksum: int | None = None) -> str:
    """Return the `weight_version` that says λ, and the checksum of the weights if it is known:
    `λ=0.6`, or `λ=0.6 checksum=00f3…`."""
    text = f"λ={Lambda(lam).key}"
    return text if checksum is None else f"{text} checksum={checksum:016x}"


def metadata_version() -> str:
    """Return the version of vLLM."""
    import vllm

    return str(vllm.__version__)


def _require_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "vLLM is not installed, or does not import here", "see https://docs.vllm.ai"
        ) from error


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


def _shut_down(llm: Any) -> None:
    with contextlib.suppress(Exception):
        llm.llm_engine.engine_core.shutdown()


def _identity(paired: Pair, tokenizer: Any) -> dict[str, Any]:
    return {
        "engine": "vllm",
        "checksum": CHECKSUM_VERSION,
        **options.of_sides(paired.base, paired.instruct),
        **options.of_tokenizer(tokenizer),
    }


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


def _speaker(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the configurations of a model that say where its texts end.

    Args:
        config: its config.json, for a class that transformers does not have.
    """
    from transformers import AutoConfig

    try:
        spoken = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        ends = config.get("text_config", config).get("eos_token_id")
        spoken = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=ends))
    path = folder / "generation_config.json"
    generation = SimpleNamespace(**read_object(path)) if path.exists() else None
    return SimpleNamespace(config=spoken, generation_config=generation)


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
    try:
        return one_line(str(causes()[0]["msg"]), 500) if callable(causes) else first_line(error)
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

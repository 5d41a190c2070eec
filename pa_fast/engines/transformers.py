"""The transformers engine: a model pair as one live transformers model.

Has been run for real on CPU. The code for one GPU is the same and has not been run on one yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_fast.base import Continuation, Generation
from pa_fast.checkpoint.config import HARMLESS
from pa_fast.checkpoint.guard import Guard
from pa_fast.checkpoint.pairing import check_configs
from pa_fast.checkpoint.reader import Checkpoint, torch_dtype
from pa_fast.checkpoint.rows import check_vocabulary, extended
from pa_fast.checkpoint.source import resolve
from pa_fast.checkpoint.streaming import DTYPES
from pa_fast.checkpoint.untrained import untrained_rows
from pa_fast.engines import endpoints, scoring
from pa_fast.engines.attached_weights import attached, divertible
from pa_fast.engines.inventory import Inventory
from pa_fast.engines.loading import Loaded, allocate, base_tensors, load_pair
from pa_fast.engines.origins import trace
from pa_fast.engines.past import obstacle
from pa_fast.engines.ranks import ALONE, Alone, Ranks
from pa_fast.errors import EngineError, UsageError, first_line
from pa_fast.live import opening, planner
from pa_fast.live.planner import RESIDENCIES, Store, planned
from pa_fast.live.room import Room
from pa_fast.live.weights import LiveWeights
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike
from pa_fast.units import format_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LambdaModel:
    """A transformers model whose weights follow λ. Make one with `pa_fast.load`; implements `pa_fast.Engine`.

    Attributes:
        model: the transformers model; its parameters are the live tensors.
        tokenizer: the tokenizer used at every λ, or None if neither folder ships one.
        weights: the `LiveWeights` behind it.
        stop_tokens: ids that end a text for either model or for the tokenizer, in order.
        notes: what loading found worth saying.
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
        self._batch_size = batch_size
        self._inventory = Inventory.of(model)

    @property
    def shared_prefix(self) -> bool:
        """Whether tokens that requests begin alike with are computed once per call."""
        return bool(self.identity["shared_prefix"])

    @property
    def lam(self) -> float | None:
        """The λ that the model holds; of a rule, its swept one."""
        return self.weights.lam

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Rewrite the model's weights in place to W(λ), and prove that the model still uses them.

        Args:
            lam: one λ for all tensors, or of the rule that was given to `load`; or a rule at its λ, such as `rule.at(0.6)`.
        """
        self.weights.set_lambda(lam)
        self.on_weights_changed()

    def resync(self) -> None:
        """Write every weight anew from the base, read again from its files where that is needed; see `LiveWeights.resync`."""
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
        return scoring.loglikelihood(self.model, pairs, self._batch_size, self.shared_prefix)

    def generate(self, prompts: Sequence[list[int]], config: Generation) -> list[list[int]]:
        """Greedy continuations of N prompts; see `pa_fast.Engine`."""
        return scoring.generate(self.model, prompts, config, self._batch_size)

    def on_weights_changed(self) -> None:
        """Prove that the model is made of what it was made of at `load`, and of nothing else that could hold old weights.

        No key-value cache of `loglikelihood` or `generate` outlives the call. Waits for the device, so that a switch is
        timed whole.

        Raises:
            EngineError: a tensor, cache or module was added to the model, replaced, moved or removed.
        """
        self._inventory.check(self.model)
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.model.device)

    def __repr__(self) -> str:
        return f"<LambdaModel {type(self.model).__name__} at λ = {self.lam} on {self.model.device}>"

    def close(self) -> None:
        """Let go of the sources; the model keeps the λ it has."""
        self.weights.close()


def load(
    base: str | Path,
    instruct: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    store: str | Store = "auto",
    residency: str = "auto",
    *,
    delta: str | Path | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    rule: RuleLike | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 8,
    endpoint_check: bool = True,
    allow_nonfinite: bool = False,
    shared_prefix: bool = True,
    extra_rows: str = "instruct",
    ranks: Ranks | Alone = ALONE,
) -> LambdaModel:
    """Load two checkpoints as one transformers model at λ = 0.

    Args:
        base, instruct: local folders, or hub ids (`org/name@revision`).
        device: `cpu`, `cuda`, `cuda:1`, …; `auto` takes the first GPU if there is one.
        dtype: live dtype of every float tensor; `auto`: the dtype that each has in the instruct files.
        store: how the delta is held, see `LiveWeights.bind`; `auto` is `dense` where it fits the device, else `packed`, else
            `dense` on the host. `attached` is `lowrank` with the factors left
            beside linear and embedding layers, where λ is a scalar of the forward pass; it may stand beside a delta.
        residency: where what is kept beside the live copy lies: `device`, `host` (pinned memory that a GPU reads at every
            switch), or `auto`: on the device as far as it fits. On a CPU it is where it is.
        delta: a file that `encode` wrote, instead of instruct; it says store and dtype.
        rounding, seed: see `LiveWeights.bind`; stochastic rounding needs a model whose tensors transformers loads as they are.
        rule: by which a plain λ spreads over the tensors, by their names in the checkpoint: a `LambdaRule`, its rows, or a
            YAML file of them.
        tokenizer: folder or hub id of the tokenizer for all λ; instruct's if not given, base's beside a delta.
        batch_size: requests per forward pass; fixed, because batch composition changes rounding.
        endpoint_check: prove that λ = 0 and 1, without the rule, give every tensor of the two models as loaded, bit for bit; of
            a lossy store, and of a delta, λ = 0 alone, with attached factors its logits; of a side that is rounded
            stochastically, neither.
        allow_nonfinite: let NaN and infinity in the weights pass.
        shared_prefix: compute tokens that requests begin alike with once per call, where the architecture allows it.
        extra_rows: vocabulary rows that one side alone has are kept as they are at every λ (`instruct`), or refused (`refuse`).
        ranks: the processes to split the model over; for `pa_fast.engines.tensor_parallel.load`, which sees to the rest.

    Cost: on CPU the sources stay memory maps of the files, so memory is one live copy and page cache; tensors that
    transformers converts while loading (fused experts) cost copies. The dense store on a CPU reads each byte of the files once,
    piece by piece: checked, written and compared while it is in cache. Other stores read them as `LiveWeights.bind` says, and
    both once more for the check.

    Raises:
        CheckpointError, PairError, DataError: the folders cannot be read or do not pair, or a file changes meanwhile; a
            later switch raises DataError where a file that is still mapped changed since.
        EngineError: transformers cannot load a side, or the endpoint check failed.
        UsageError: unknown device, dtype, store, rounding, residency or policy of extra rows, stochastic rounding of tensors that
            are converted or split, or a rule that does not fit the checkpoint's names.
    """
    import torch

    for option, value, known in (
        ("residency", residency, RESIDENCIES if delta is None else ("auto", "device")),
        ("dtype", dtype, ("auto", *DTYPES)),
    ):
        if value not in known:
            raise UsageError(f"{option} `{value}` is not available", f"available: {', '.join(known)}")
    if (instruct is None) == (delta is None):
        raise UsageError("one of an instruct model and a delta file is needed", "give the instruct folder, or delta= (--delta)")
    if delta is not None and (store not in ("auto", "attached") or dtype != "auto"):
        raise UsageError(
            "a delta file says by itself how it is held, and in which dtype", "leave out both; store attached alone fits"
        )
    how, ruled = Rounding(rounding, seed), None if rule is None else LambdaRule.of(rule)
    where, held = _device(device), planned(store)
    sharding = ranks.sharding()
    about = None if delta is None else opening.about(delta)
    said = held.describe() if about is None else about.options
    aside = getattr(held, "attached", False)
    if aside and about is not None:
        said = f"{said}, attached"
    if how.drawn and (sharding or about is not None):
        what = "a delta file" if about is not None else "a model that is split over processes"
        raise UsageError(f"stochastic rounding of {what}", "use rounding nearest, or the whole pair in one process")
    if aside and ruled is not None:
        raise UsageError(f"a λ rule for a delta that is held as `{said}`: its factors share one λ", "use another store")
    if sharding and not (about is None and held.lossless):
        raise UsageError(f"a model that is split over processes cannot be held as `{said}`", "use dense, or sparse exact")
    other = base if instruct is None else instruct  # base stands on both sides where a delta does for instruct
    with ranks.step("loading"), Checkpoint.open(resolve(base)) as b, Checkpoint.open(resolve(other)) as i:
        check_configs(b, i, tying=False)
        rows = extended(b.tensors, i.tensors, b.config, i.config)
        notes = check_vocabulary(b, i, rows, extra_rows) + (untrained_rows(b, i) if about is None else ())
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        apart = () if about is None else about.tensors
        loaded = load_pair(b, i, wanted if about is None else _only(about), sharding, apart, extra_rows=bool(rows))
        traced = trace(loaded.module, [*b.tensors, *i.tensors])
        held_as: planner.Plan | None = None
        if about is None and not aside:
            exact = "dense" if store == "auto" and how.drawn else store
            held_as = planner.plan(_sizes(loaded), exact, residency, Room.of(where), allocated=False)
            said = held_as.store.describe()
            loaded.notes.append(f"the delta is held {held_as.describe()}")
        guard = Guard(b, i)
        guard.check_names()
        chosen = _tokenizer(resolve(tokenizer) if tokenizer is not None else i.folder)
        identity = {
            "engine": "transformers",
            "base": b.quick_fingerprint(),
            "instruct": i.quick_fingerprint() if about is None else f"delta {about.fingerprint()}",
            "base_config": _configuration(b),
            "instruct_config": _configuration(i),
            "store": said,
            "rounding": str(how),
            **({} if ruled is None else {"rule": ruled.document()}),
            "dtype": dtype,
            "tokenizer": _digest(_spelling(chosen)),
            "chat_template": _digest(json.dumps(getattr(chosen, "chat_template", None), sort_keys=True)),
        }
    with ranks.step("allocating"):
        allocate(loaded, where)
        guard.check()
    if how.drawn:
        traced.check_elementwise({name: tensor for name, tensor in loaded.live.items() if tensor.is_floating_point()})
    ends, said_of_them = endpoints.ends(loaded, delta is None and held.lossless, how.drawn) if endpoint_check else ({}, [])
    loaded.notes += said_of_them
    ids = endpoints.prompts(_vocabulary(loaded.module, loaded.reference), where)
    expected = endpoints.base_logits(loaded, ids) if endpoint_check and aside else None
    stops = _stop_tokens(chosen, loaded.reference, loaded.module)
    del loaded.reference
    with ranks.step("binding"):
        guard.check()
        diverted = divertible(held, loaded.module) if aside else None
        weights: Any
        if delta is None:
            sides = (loaded.base, loaded.instruct)
            weights = LiveWeights.bind(
                loaded.live, *sides, diverted or held_as or held, how.mode,
                seed=how.seed, via=loaded.via, allow_nonfinite=allow_nonfinite, origins=traced.names,
                reread=lambda: base_tensors(resolve(base), resolve(other), loaded.live),
                ends=None if aside else ends,
            )  # fmt: skip
        else:
            put_aside = diverted.put_aside if diverted else None
            with opening.again(delta, about) as file:
                guard.add(file.file)
                weights = LiveWeights.open(
                    loaded.live, loaded.base, file, allow_nonfinite=allow_nonfinite, divert=put_aside, origins=traced.names
                )
                if not aside:
                    weights.prove(ends)
        if weights.memory().mapped_bytes:
            weights.before_reading = guard.check
        if diverted is not None:
            weights = attached(loaded.module, weights, diverted.factors)
    identity["lossless"] = weights.lossless
    if not weights.lossless:
        loaded.notes.append(f"λ = 1 is not the instruct model: the delta is held as {said}, which loses some of it")
    if expected is not None:
        endpoints.check_logits(loaded.module, ids, expected)
    loaded.ends.clear()
    if ruled is not None:
        with ranks.step("following the rule"):
            weights.follow(ruled)
        loaded.notes += weights.touched(ruled)
    configuration = {
        "base": str(base),
        "instruct": str(instruct if delta is None else delta),
        "tokenizer": str(other if tokenizer is None else tokenizer),
        "device": str(where),
        "live_dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in loaded.live.values()}),
        "attention": str(loaded.module.config._attn_implementation),
    }
    memory = weights.memory()
    if where.type == "cpu":
        mapped = f", beside {format_bytes(memory.mapped_bytes)} of mapped files (page cache)" if memory.mapped_bytes else ""
        loaded.notes.append(f"memory: {format_bytes(memory.live_bytes)} for the live copy{mapped}")
    copied = memory.host_bytes
    if copied and not sharding:
        what = "tensors converted while loading" if said == "dense" else f"deltas ({said}) and tensors converted while loading"
        loaded.notes.append(f"{what} cost {format_bytes(copied)} of memory beside the file maps")
    why_not = obstacle(loaded.module) if shared_prefix else None
    if why_not:
        loaded.notes.append(f"shared prefixes are computed for every request again: of {type(loaded.module).__name__}, {why_not}")
    return LambdaModel(
        loaded.module,
        chosen,
        weights,
        identity,
        configuration,
        batch_size,
        [*notes, *loaded.notes],
        stops,
        shared_prefix and not why_not,
    )


def _sizes(loaded: Loaded) -> list[planner.Size]:
    """What each live float tensor takes, by its first name, and a dense delta beside it."""
    first = {id(tensor): name for name, tensor in reversed(loaded.live.items()) if tensor.is_floating_point()}
    return [
        planner.Size(
            n, loaded.live[n].nbytes, loaded.base[n].nbytes + loaded.instruct[n].nbytes, (loaded.base[n], loaded.instruct[n])
        )
        for n in first.values()
    ]


def _only(about: opening.Description) -> torch.dtype:
    """The dtype of a model whose live tensors are those of a delta: what transformers keeps in fp32 beside it, it keeps again."""
    live = {one.live for one in about.tensors.values()}
    narrow = live - {"F32"} or live
    if len(narrow) != 1:
        raise EngineError(f"the delta is for live tensors of {', '.join(sorted(live)) or 'no dtype'}", "encode it with one dtype")
    return torch_dtype(narrow.pop())


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device `{name}` is not known", "write cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device `{name}` is not supported", "write cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device `{name}` does not exist: PyTorch sees {torch.cuda.device_count()} GPUs", "write cpu or auto")
    return device


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None where there is none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a tokenizer file can break
        said = first_line(error)
        raise EngineError(f"transformers cannot load the tokenizer in {folder}: {said}", "check tokenizer.json there") from error
    # It would warn of long texts, which evaluators cut into windows; what is too long for the model is refused by the engine.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _stop_tokens(tokenizer: Any, *models: PreTrainedModel) -> list[int]:
    """Every id that ends a text for one of `models`, by its own configurations, or for `tokenizer`."""
    speakers = [tokenizer, *(c for m in models for c in (m.config.get_text_config(), getattr(m, "generation_config", None)))]
    found = [getattr(s, "eos_token_id", None) for s in speakers]
    return sorted({i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])})


def _configuration(checkpoint: Checkpoint) -> str:
    """Digest of what config.json says about the function that the model computes."""
    return _digest(json.dumps({k: v for k, v in checkpoint.config.items() if k not in HARMLESS}, sort_keys=True))


def _spelling(tokenizer: Any) -> str:
    """Everything that decides how `tokenizer` splits text, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else repr(tokenizer)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _vocabulary(*models: PreTrainedModel) -> int:
    return min(model.get_input_embeddings().weight.shape[0] for model in models)

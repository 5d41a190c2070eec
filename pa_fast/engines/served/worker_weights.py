"""In a worker of an engine: live weights over the parameters of its model, and what proves them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pa_kernels

from pa_fast.base import Lambda
from pa_fast.checkpoint.content import content_fingerprint
from pa_fast.checkpoint.pair import Pair, PairOptions, is_head, pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.safetensors import FLOATS, torch_dtype
from pa_fast.checkpoint.streaming import MergeSpec
from pa_fast.engines.served import layout
from pa_fast.errors import EngineError, PaFastError, UsageError, WeightsError, first_line
from pa_fast.live.sources import Sources
from pa_fast.live.weights import LiveWeights
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule
from pa_fast.stores import registry

if TYPE_CHECKING:
    import torch

PROOF = Lambda("1/3")
"""The interior λ at which a switch is compared with a merge that the engine loads."""


class Stack(Protocol):
    """The engine that a worker belongs to, as far as its weights are concerned.

    Attributes:
        name: of the engine, in messages.
        keeps_weights: what to start the engine with, where its parameters are empty.
        dtype: that the model computes in.
        world, rank: the workers that the model is split over, and which of them this one is.
    """

    name: ClassVar[str]
    keeps_weights: ClassVar[str]

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def world(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def check(self, model: Any) -> None:
        """Raise EngineError where something runs that is not supported."""
        ...

    def reload(self, model: Any, tensors: layout.NamedTensors) -> set[str]:
        """Load `tensors` into the parameters of `model` as the engine loads a checkpoint, in place;
        return the names of the parameters that were loaded."""
        ...

    def after_write(self, model: Any) -> None:
        """Make again what the engine makes of the parameters, after these were written."""
        ...


class WorkerWeights:
    """The live weights of one worker. All methods take its model first, and return plain values."""

    def __init__(self, stack: Stack):
        self._stack = stack
        self._error: PaFastError | None = None
        self._live: LiveWeights | None = None
        self._sides: dict[str, Path] = {}
        self._pairing = PairOptions()
        self._tensor_parts: layout.TensorParts | None = None
        self._key: str | None = None
        self._loaded = False
        self._is_written = False
        self._pointers: dict[str, int] = {}
        self._sums: dict[str, list[str]] = {}
        self._report: dict[str, Any] = {}

    # --- binding

    def bind_at_load(self, model: Any, pair_arguments: Mapping[str, Any]) -> None:
        """`bind`, whose error is raised by the first call: what a loader raises in a worker process
        reaches nobody."""
        with contextlib.suppress(PaFastError):  # `bind` has kept it
            self.bind(model, pair_arguments)

    def bind(self, model: Any, pair_arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Bind the pair, see `_bind`; a worker binds once.

        Raises:
            UsageError: it follows a pair already; nothing was written.
            PaFastError: an argument is not valid, or a proof failed. Once a side was loaded the
                model must not be used then, and no λ can be set; before that another pair may be
                bound.
        """
        if self._live is not None:
            raise UsageError(
                f"this {self._stack.name} engine follows a pair already: {self._sides['base']} and"
                f" {self._sides['instruct']}",
                "use what its binding returned, or start another engine",
            )
        if self._error is not None and self._is_written:
            raise self._error
        self._error = None
        try:
            return self._bind(model, pair_arguments)
        except PaFastError as error:
            self._live, self._key, self._error = None, None, error
            raise
        except Exception as error:  # of the engine's own loading
            self._live, self._key = None, None
            self._error = EngineError(
                f"{self._stack.name} cannot load the pair anew: {type(error).__name__}:"
                f" {first_line(error)}",
                "sweep it with the transformers engine",
            )
            raise self._error from error

    def _bind(self, model: Any, pair_arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Make the parameters of `model`, which holds the instruct side as the engine loaded it,
        follow λ, after these proofs, in this order:

        1. what runs is supported (`Stack.check`);
        2. the files are of the dtype that the engine computes in;
        3. no name of either side is left out, no parameter is empty;
        4. instruct, loaded again through `Pair`, equals the parameters as started, bit for bit, and
           so do all other tensors of the model, and those of base;
        5. the switch to λ = 1/3 equals the merge at 1/3, loaded by the engine.

        Args:
            pair_arguments: `base`, `instruct`, and options: `pairing`, `store`, `residency`,
                `rounding`, `rule`, `allow_nonfinite`.

        Returns:
            The report: `tensors`, `bytes`, `memory`, `store`, and on rank 0 `content`, the content
            fingerprints of both sides.

        The weights hold instruct afterwards, as the engine loads it; no λ is set.

        Raises:
            PaFastError: a proof failed. The model must not be used then.
        """
        self._stack.check(model)
        self._sides = {side: Path(pair_arguments[side]) for side in ("base", "instruct")}
        self._pairing = PairOptions.read(pair_arguments.get("pairing", {}))
        rounding = Rounding.parse(pair_arguments.get("rounding", "nearest"))
        rule = LambdaRule(pair_arguments["rule"]) if pair_arguments.get("rule") else None
        name, options = pair_arguments.get("store") or ("dense", {})
        store = registry.STORES[name](**options)
        if rounding.is_stochastic and self._stack.world > 1:
            raise UsageError(
                f"stochastic rounding of a model that is split over {self._stack.world} ranks",
                "use rounding nearest, or one rank",
            )
        if not store.lossless or store.attached:
            raise UsageError(
                f"{self._stack.name}'s weights cannot be held as `{store.describe()}`, which loses"
                " some of the delta",
                "use dense, packed, or sparse exact",
            )
        started = self._copies(model)
        empty = [name for name, tensor in started.items() if not tensor.numel()]
        if empty:
            raise EngineError(
                f"{self._stack.name} has dropped the weights of `{empty[0]}`{_more(empty)}",
                self._stack.keeps_weights,
            )
        self._pointers = _pointers(model)
        others = layout.others(model)
        with (
            Checkpoint.open(self._sides["base"]) as base,
            Checkpoint.open(self._sides["instruct"]) as instruct,
        ):
            paired = pair(base, instruct, self._pairing)
            self._check_head(model, paired)
            file_dtype = self._file_dtype(paired)
            self._is_written = True
            if rule is not None or rounding.is_stochastic:
                load = functools.partial(self._stack.reload, model)
                self._tensor_parts = layout.TensorParts.traced(model, load, paired)
            sides = {}
            for side in ("base", "instruct"):
                sides[side] = self._captured(model, paired, side, others)
            self._check_started(started, sides["instruct"])
            files = {"base": base, "instruct": instruct} if self._stack.rank == 0 else {}
            content = {side: content_fingerprint(one) for side, one in files.items()}
            del started, others
            live = self._views(layout.parameters(model))
            sides = {side: self._views(tensors) for side, tensors in sides.items()}
            names = None if self._tensor_parts is None else self._tensor_parts.checkpoint_names()
            intermediate_dtypes = {n: file_dtype for n, p in live.items() if p.dtype != file_dtype}
            self._sums = {n: _sums(sides, n) for n in live}
            self._live = LiveWeights.between(
                live,
                Sources(sides["base"], sides["instruct"], intermediate_dtypes, names),
                store,
                rounding,
                residency=pair_arguments.get("residency", "device"),
                allow_nonfinite=bool(pair_arguments.get("allow_nonfinite", False)),
            )
            if rule is not None:
                self._live.follow(rule)
            self._check_merge(model, paired, MergeSpec.of(PROOF, rounding, rule=rule))
        self.load(model, "instruct")
        self._report = {
            "tensors": len(live),
            "bytes": sum(p.nbytes for p in live.values()),
            "memory": asdict(self._live.memory()),
            "store": self._live.store,
            "content": content,
        }
        return self._report

    def report(self, model: Any) -> dict[str, Any]:
        """Return the report of `bind`, and the checksums of both sides of each tensor."""
        self._bound()
        return {**self._report, "sums": self._sums, "rank": self._stack.rank}

    def _captured(
        self, model: Any, paired: Pair, side: str, others: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Load `side` and return copies of the parameters, on the host."""
        loaded = self._stack.reload(model, layout.tensors_of(paired, side))
        if moved := self._moved(model):
            raise EngineError(
                f"{self._stack.name} moved or replaced `{moved[0]}`{_more(moved, ' parameters')}"
                f" when it loaded {side}",
                "sweep this pair with the transformers engine",
            )
        missing = sorted(layout.parameters(model).keys() - loaded)
        if missing:
            raise EngineError(
                f"{self._stack.name} loads nothing of {side} into `{missing[0]}`"
                f"{_more(missing, ' parameters')}",
                "both folders must hold every weight of the model",
            )
        derived = next(iter(layout.unlike(others, layout.others(model))), None)
        if derived is not None:
            raise EngineError(
                f"{self._stack.name}'s `{derived}` is made of the weights of {side}, and would not"
                " follow λ",
                "sweep this pair with the transformers engine",
            )
        return self._copies(model)

    def _copies(self, model: Any) -> dict[str, torch.Tensor]:
        """Return copies of the parameters, on the host."""
        return {n: p.detach().to("cpu", copy=True) for n, p in layout.parameters(model).items()}

    def _views(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the live tensors in `tensors`, parameters by name or copies of them: themselves,
        or their parts where tensors of the checkpoint have a λ or noise of their own."""
        plain = {name: tensor.detach() for name, tensor in tensors.items()}
        return plain if self._tensor_parts is None else self._tensor_parts.split(plain)

    def _check_started(
        self, started: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]
    ) -> None:
        unlike = list(layout.unlike(started, loaded))
        if unlike:
            raise EngineError(
                f"`{unlike[0]}`{_more(unlike, ' parameters')} of instruct, loaded into"
                f" {self._stack.name} a second time, are not what {self._stack.name} started with",
                f"{self._stack.name} lays these weights out anew when it starts, and only then:"
                " sweep this architecture with the transformers engine",
            )

    def _check_head(self, model: Any, paired: Pair) -> None:
        """Refuse a merge with a head of its own in a model that shares the embedding's storage."""
        every = dict(model.named_parameters(remove_duplicate=False))
        shared = len(every) > len({p.data_ptr() for p in every.values()})
        if paired.is_untied or (shared and _has_own_head(paired)):
            raise EngineError(
                "the merge of this pair has an output head of its own, and"
                f" {self._stack.name} started on instruct shares the embedding's storage with it",
                "sweep it with the transformers engine, or make both sides say"
                " tie_word_embeddings: false in config.json and store the head",
            )

    def _file_dtype(self, paired: Pair) -> torch.dtype:
        """Return the dtype of all float tensors in the files.

        Raises:
            EngineError: there are several, or the engine computes in a narrower one.
        """
        dtypes: dict[str, str] = {}
        for name in paired.names:
            for side in ("base", "instruct"):
                dtype = paired.stored(side, name).dtype
                if dtype in FLOATS:
                    dtypes.setdefault(dtype, f"`{name}` of {side}")
        held = self._stack.dtype
        exact = {d: torch_dtype(d) for d in dtypes}
        if len(dtypes) > 1 or any(d != held and held.itemsize < 4 for d in exact.values()):
            odd = next(d for d in dtypes if exact[d] != held)
            raise EngineError(
                f"{dtypes[odd]} is {odd} in its file, and {self._stack.name} computes in"
                f" {str(held).removeprefix('torch.')}: it would round each side before the merge",
                f"start {self._stack.name} with the dtype of the files (dtype=), or convert both"
                " sides to one dtype first",
            )
        return next(iter(exact.values()))

    def _check_merge(self, model: Any, paired: Pair, spec: MergeSpec) -> None:
        live = self._bound()
        live.set_lambda(spec.lam)
        written = live.checksum()
        self._stack.reload(model, layout.merged_tensors(paired, spec))
        self._loaded = True
        wrong = live.changed()
        if wrong or live.checksum() != written:
            raise EngineError(
                f"the switch to λ = {spec.lam.key} is not the merge that {self._stack.name} loads:"
                f" `{wrong[0] if wrong else 'no tensor'}`{_more(wrong)} differs",
                f"{self._stack.name} converts these weights as it loads them: sweep this pair with"
                " the transformers engine",
            )

    # --- calls

    def set_lambda(self, model: Any, key: str, rows: Any = None) -> str:
        """Write W(λ). Args: λ as `Lambda.key`; rows of a rule at that λ, or None."""
        live = self._bound()
        self._check_storage(model)
        lam = LambdaRule(rows, key) if rows else Lambda(key)
        live.check_lambda(lam)  # before the λ that is held is forgotten
        self._key = None
        if self._loaded and not (live.plan and live.plan.store.keeps_sources):
            # such a store switches from what memory holds
            self.load(model, "base")
            live.resync({n: t.clone() for n, t in self._views(layout.parameters(model)).items()})
        self._loaded = False
        live.set_lambda(lam)
        self._stack.after_write(model)
        self._key = key
        return key

    def check_lambda(self, model: Any, key: str, rows: Any = None) -> None:
        """See `LiveWeights.check_lambda`."""
        self._bound().check_lambda(LambdaRule(rows, key) if rows else Lambda(key))

    def lam(self, model: Any) -> str | None:
        """Return λ as `Lambda.key`; None where none is set."""
        return self._key if self._bound().lam is not None else None

    def load(self, model: Any, side: str) -> None:
        """Load `side` as the engine loads a checkpoint, in place of a λ."""
        self._loaded, self._key = True, None
        with (
            Checkpoint.open(self._sides["base"]) as base,
            Checkpoint.open(self._sides["instruct"]) as instruct,
        ):
            paired = pair(base, instruct, self._pairing)
            self._stack.reload(model, layout.tensors_of(paired, side))
        self._stack.after_write(model)  # vLLM leaves what it packed of a tied head as it was

    def checksum(self, model: Any) -> str:
        """Return `LiveWeights.checksum` in hex."""
        return f"{self._bound().checksum():016x}"

    def read_back(self, model: Any, merge_again: bool) -> str:
        """Return `LiveWeights.read_back` in hex."""
        self._check_storage(model)
        return f"{self._bound().read_back(merge_again):016x}"

    def changed(self, model: Any) -> list[str]:
        """See `LiveWeights.changed`."""
        return self._bound().changed()

    def projection(self, model: Any, copies: Sequence[str] = ()) -> list[float]:
        """See `LiveWeights.projection`; of `copies`, which all ranks have, in rank 0 alone."""
        return list(self._bound().projection(self._own(copies)))

    def aim(self, model: Any, copies: Sequence[str] = ()) -> list[float]:
        """See `LiveWeights.aim`; of `copies` in rank 0 alone."""
        return list(self._bound().aim(self._own(copies)))

    def _own(self, copies: Sequence[str]) -> set[str] | None:
        return self._sums.keys() - set(copies) if copies and self._stack.rank else None

    def inventory(self, model: Any) -> None:
        """Raise EngineError where the model no longer consists of the parameters that were
        bound."""
        self._check_storage(model)

    def _check_storage(self, model: Any) -> None:
        if moved := self._moved(model):
            raise EngineError(
                f"{self._stack.name}'s parameter `{moved[0]}`{_more(moved)} was added, removed or"
                " moved since the pair was bound",
                "start the engine again, and leave its model alone",
            )

    def _moved(self, model: Any) -> list[str]:
        """Return the names of parameters that are not, or not where, they were before the pair was
        bound."""
        then, now = self._pointers, _pointers(model)
        return [name for name in {**then, **now} if then.get(name) != now.get(name)]

    def _bound(self) -> LiveWeights:
        if self._error is not None:
            raise self._error
        if self._live is None:
            raise WeightsError("this worker is bound to no pair", "bind it first")
        return self._live


def _pointers(model: Any) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False)}


def _sums(sides: Mapping[str, Mapping[str, torch.Tensor]], name: str) -> list[str]:
    """Return the checksum of each side's tensor `name`, in hex."""
    return [f"{total:016x}" for total in pa_kernels.checksum([s[name] for s in sides.values()])]


def _has_own_head(paired: Pair) -> bool:
    return any(is_head(name) for name in paired.names)


def _more(names: Sequence[str], what: str = "") -> str:
    return f" and {len(names) - 1} more{what}" if len(names) > 1 else ""


def weights_of(model: Any, stack: Stack) -> WorkerWeights:
    """Return the live weights of `model`, new ones of `stack` at the first call."""
    if not isinstance(getattr(model, "pa_fast", None), WorkerWeights):
        model.pa_fast = WorkerWeights(stack)
    known: WorkerWeights = model.pa_fast
    return known


def answer(model: Any, stack: Stack, method: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """Call `method` of the live weights of `model`, for a driver in another process.

    Returns:
        `value`, or `error`: class, message and hint of a PaFastError.
    """
    try:
        return {"value": getattr(weights_of(model, stack), method)(model, *arguments)}
    except PaFastError as error:
        return {"error": [type(error).__name__, error.message, error.hint]}

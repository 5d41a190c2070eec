"""A model pair as one object with λ, scoring and generation, and the inventory by which it checks
that nothing but the live tensors holds weights."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from pa_fast.base import Continuation, Generation
from pa_fast.engines import scoring
from pa_fast.engines.layout import local
from pa_fast.errors import EngineError, UsageError
from pa_fast.files import path_of
from pa_fast.live.weights import LiveWeights
from pa_fast.rules import LambdaRule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pa_fast.checkpoint.merge import MergeReport
    from pa_fast.checkpoint.provenance import ChosenFrom


@dataclass(frozen=True)
class Inventory:
    """Every tensor, key-value cache and module of a model (parameters, buffers, plain attributes of
    any submodule, and items of their lists, tuples, deques, sets and dicts), and the settings by
    which it computes.

    Attributes:
        held: name → the object, and its address if it is a tensor.
        fixed: name → version counter of a tensor that follows no λ, such as a rotary table.
        settings: name → number, flag, text, hook or patched method of any submodule and of the
            configuration.
        rotary: rotary embeddings, which swap tables by the length of a text; their attributes and
            buffers.
        tables: id of a buffer that a rotary embedding may write to in place (transformers since
            5.24) → what it held.
        snapshot: the containers that all of this was found in; None where tensors are sharded.
    """

    held: Mapping[str, tuple[object, int]]
    fixed: Mapping[str, int]
    settings: Mapping[str, object]
    rotary: Sequence[tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]]
    tables: Mapping[int, torch.Tensor]
    snapshot: _Snapshot | None

    @classmethod
    def of(cls, model: torch.nn.Module) -> Inventory:
        """Return the inventory of `model` as it is."""
        rotary = [m for m in model.modules() if hasattr(m, "rope_type") and not m._parameters]
        own = {
            id(table): table.clone()
            for m in rotary
            if _rewrites(m)
            for table in m._buffers.values()
            if table is not None
        }
        held = {name: (thing, _address(thing)) for name, thing in tensors_and_modules(model)}
        followed = set(model.state_dict(keep_vars=True))
        for path, module in model.named_modules(remove_duplicate=False):
            followed.update(
                f"{path}.{key}".removeprefix(".") for key in getattr(module, "follows_lambda", ())
            )
        return cls(
            held,
            {
                name: _version(thing)
                for name, (thing, _) in held.items()
                if name not in followed and id(thing) not in own
            },
            dict(_settings(model)),
            [(module, dict(vars(module)), dict(module._buffers)) for module in rotary],
            own,
            _Snapshot.of(model),
        )

    def check(self, model: torch.nn.Module) -> None:
        """Restore the rotary tables of the inventory, drop transformers' own cache, and compare the
        rest.

        Cost: 1 ms for 400 modules of which nothing has changed, else 4; reads no tensor.

        Raises:
            EngineError: something was added, replaced, moved or removed.
        """
        from transformers import Cache

        for module, attributes, buffers in self.rotary:
            for key in vars(module).keys() - attributes.keys():
                del vars(module)[key]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            for table in buffers.values():
                if id(table) in self.tables:
                    table.copy_(self.tables[id(table)])
        if "_cache" not in self.held and isinstance(vars(model).get("_cache"), Cache):
            del vars(model)["_cache"]  # the static cache of generation, which makes a new one
        if self._is_unchanged():
            return
        # names are looked for only where something differs, which may still be allowed
        current = dict(tensors_and_modules(model))
        for name, (thing, address) in self.held.items():
            now = current.pop(name, None)
            if now is not thing or _address(now) != address:
                _refuse(name, "is gone" if now is None else "was replaced or moved", thing)
            if name in self.fixed and _version(now) != self.fixed[name]:
                _refuse(name, "was written to", thing)
        for name, thing in current.items():
            _refuse(name, "was added", thing)
        settings = dict(_settings(model))
        for name in settings.keys() | self.settings.keys():
            before, after = self.settings.get(name), settings.get(name)
            # a new plain value changes no result; a new hook or method may
            new = before is None and isinstance(after, (bool, int, float, str))
            if before is not after and before != after and not new:
                raise EngineError(
                    f"`{name}` was changed since the pair was loaded: it was {_shown(before)}, and"
                    f" is {_shown(after)}",
                    "an evaluator must leave the model as it found it, in evaluation mode and"
                    " without hooks",
                )

    def _is_unchanged(self) -> bool:
        return (
            self.snapshot is not None
            and self.snapshot.holds()
            and all(_address(thing) == address for thing, address in self.held.values())
            and all(_version(self.held[name][0]) == was for name, was in self.fixed.items())
        )


@dataclass(frozen=True)
class _Snapshot:
    """The containers of a model (attributes, parameters, buffers, children and hooks of every
    module, lists and the like among its attributes, attributes of the configuration) with the
    objects in them, to compare by identity.

    While none has changed, all modules are still reached, and each has what it had.
    """

    modules: Sequence[tuple[torch.nn.Module, dict[str, Any]]]
    filled: Sequence[tuple[Any, tuple[Any, ...], tuple[Any, ...]]]  # container, keys, values
    empty: Sequence[Any]

    @classmethod
    def of(cls, model: torch.nn.Module) -> _Snapshot | None:
        if any(local(tensor) is not tensor for tensor in model.state_dict(keep_vars=True).values()):
            return None  # a shard can be replaced within its tensor
        modules = [(module, vars(module)) for module in model.modules()]
        containers: list[Any] = [
            value
            for _, attributes in modules
            for value in attributes.values()
            if _kind(value.__class__) in ("mapping", "sequence")
        ]
        config: Any = getattr(model, "config", None)
        parts = [] if config is None else [vars(config), vars(config.get_text_config())]
        filled = [*(attributes for _, attributes in modules), *parts, *filter(len, containers)]
        return cls(
            modules,
            [(container, *_contents(container)) for container in filled],
            [container for container in containers if not len(container)],
        )

    def holds(self) -> bool:
        """Return whether every container holds the objects that it held, and no others."""
        if any(map(len, self.empty)) or any(vars(m) is not own for m, own in self.modules):
            return False
        for container, keys, values in self.filled:
            now, objects = _contents(container)
            if len(objects) != len(values) or now != keys or not all(map(is_, objects, values)):
                return False
        return True


def _contents(container: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the keys, none for a sequence, and the values of a container."""
    if isinstance(container, dict):
        return tuple(container), tuple(container.values())
    return (), tuple(container)


def _rewrites(rotary: torch.nn.Module) -> bool:
    """Return whether the tables of `rotary` depend on the length of the text."""
    return any(kind in str(rotary.rope_type) for kind in ("dynamic", "longrope"))


def _refuse(name: str, what: str, thing: object) -> None:
    raise EngineError(
        f"`{name}` {what} since the pair was loaded: a {type(thing).__name__} that may not be what"
        " λ says",
        "do not tie, move, convert, patch or reload the model after pa_fast.load, and leave nothing"
        " on it; load the pair again",
    )


def tensors_and_modules(model: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Yield names and objects in the order of the model; a tied one by each of its names."""
    import torch

    common = vars(torch.nn.Module()).keys()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is not None:
                    yield prefix + key, local(tensor)
        for key, value in vars(module).items():
            kind = None if key in common else _kind(value.__class__)
            if kind == "weight":
                yield prefix + key, value
            elif kind is not None:
                for inner, thing in value.items() if kind == "mapping" else enumerate(value):
                    if _kind(thing.__class__) == "weight":
                        yield f"{prefix}{key}[{inner!r}]", thing


def _settings(model: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Yield by name what shapes the function beside tensors: plain values, hooks, and methods set
    on instances."""
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, FunctionType, MethodType)):
                yield prefix + key, value
            elif key.endswith("_hooks") and value:
                yield prefix + key, list(value.values())
    config: Any = getattr(model, "config", None)
    for part in () if config is None else (config, config.get_text_config()):
        for key, value in vars(part).items():
            if isinstance(value, (bool, int, float, str)):
                yield f"config.{key}", value


def _shown(value: object) -> str:
    return (
        repr(value)
        if isinstance(value, (bool, int, float, str))
        else "absent"
        if value is None
        else f"a {type(value).__name__}"
    )


def _version(thing: object) -> int:
    import torch

    return thing._version if isinstance(thing, torch.Tensor) and not thing.is_inference() else 0


@functools.cache
def _kind(kind: type) -> str | None:
    """Return `weight` for classes whose objects can hold weights or what was computed from them,
    `mapping` or `sequence` for containers, else None."""
    import torch
    from transformers import Cache

    if issubclass(kind, (torch.Tensor, torch.nn.Module, Cache)):
        return "weight"
    return (
        "mapping"
        if issubclass(kind, dict)
        else "sequence"
        if issubclass(kind, (list, tuple, set, deque))
        else None
    )


def _address(thing: object) -> int:
    import torch

    return thing.data_ptr() if isinstance(thing, torch.Tensor) else 0


# --- model


class LambdaModel:
    """A transformers model whose weights follow λ. Make one with `pa_fast.load`; implements
    `pa_fast.Engine`.

    Warns once, through the logger `pa_fast`, where prefixes were to be shared and are not
    (`not_shared` says why), with what it costs: at the first requests that begin alike.

    Example:
        lm = pa_fast.load("base", "instruct")
        for lam in pa_fast.lambdas("0:1:0.1"):
            lm.set_lambda(lam)
            ids = lm.model.generate(**lm.tokenizer("1 + 1 =", return_tensors="pt"))

    Attributes:
        model: the transformers model; its parameters are the live tensors.
        tokenizer: the tokenizer used at every λ, or None if neither folder ships one.
        weights: the `LiveWeights` behind it.
        stop_tokens: ids that end a text for either model or for the tokenizer, in order.
        notes: what a user should know of the loaded pair.
        on_progress: called with (requests done, requests in all) within `loglikelihood` and
            `generate`; None, or set by a sweep.
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
        """True if a prefix that requests have in common is computed once per call."""
        return bool(self.identity["shared_prefix"])

    @property
    def positions(self) -> int | None:
        """The most tokens that the model has positions for; None where its configuration does not
        say."""
        return scoring.positions(self.model)

    @property
    def lam(self) -> float | None:
        """The λ that the model holds; of a rule, its swept one."""
        return self.weights.lam

    def set_lambda(self, lam: float | LambdaRule) -> None:
        """Write W(λ) into the model's weights in place, and check that the model still uses them.

        Args:
            lam: one λ for all tensors, or of the rule that was given to `load`; or a rule at its λ,
                such as `rule.at(0.6)`.

        Example:
            lm.set_lambda(0.6)
            scores = evaluate(lm.model)

        Raises:
            UsageError, WeightsError: see `LiveWeights.set_lambda`.
            EngineError: see `on_weights_changed`.
        """
        self.weights.set_lambda(lam)
        self.on_weights_changed()

    def resync(self) -> None:
        """Write every weight anew from the base, which is read again from its files if needed; see
        `LiveWeights.resync`."""
        self.weights.resync()
        self.on_weights_changed()

    @contextlib.contextmanager
    def at(self, lam: float | LambdaRule) -> Iterator[LambdaModel]:
        """Set λ within a `with` block, and restore the previous λ, or rule, after it.

        Example:
            with lm.at(0.3):
                scores = evaluate(lm.model)
        """
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
        """Return greedy continuations of N prompts; see `pa_fast.Engine`."""
        return scoring.generate(self.model, prompts, config, self._batch_size, self.on_progress)

    def on_weights_changed(self) -> None:
        """Check that the model consists of the tensors and modules that it had at `load`, and of
        nothing else that could hold old weights.

        No key-value cache of `loglikelihood` or `generate` outlives its call. Waits for the device,
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
        chosen_from: ChosenFrom | None = None,
    ) -> MergeReport:
        """Write the live weights as a checkpoint folder `out`, as `pa_fast.merge` does at this λ:
        in instruct's names and layout, whole or not at all, with the record that `pa_fast.verify`
        reads.

        Args:
            max_shard_size, overwrite, progress, chosen_from: see `pa_fast.merge`.

        Example:
            lm.set_lambda(0.6)
            lm.save("merged")

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
            store=None if self.weights.lossless else self.identity["store"],
            chosen_from=chosen_from,
            **self._pair,
        )

    def __repr__(self) -> str:
        return f"<LambdaModel {type(self.model).__name__} at λ = {self.lam} on {self.model.device}>"

    def close(self) -> None:
        """Release the sources; the model keeps the λ it has."""
        self.weights.close()

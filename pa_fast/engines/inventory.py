"""What a model computes with, as it was when the endpoint check proved it: everything that could
hold weights."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from pa_fast.engines.layout import local
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Inventory:
    """Every tensor, key-value cache and module that hangs on a model, wherever: parameters,
    buffers, plain attributes of any submodule, and what lies in their lists, tuples, deques, sets
    and dicts; and the settings by which it computes.

    Attributes:
        held: name → the object, and its address if it is a tensor.
        fixed: name → how often a tensor that follows no λ, such as a rotary table, was written.
        settings: name → number, flag, text, hook or patched method of any submodule and of the
            configuration.
        rotary: rotary embeddings, which swap tables by the length of a text; their attributes and
            buffers.
        tables: id of a buffer that a rotary embedding may write to in place (transformers since
            5.24) → what it held.
    """

    held: Mapping[str, tuple[object, int]]
    fixed: Mapping[str, int]
    settings: Mapping[str, object]
    rotary: Sequence[tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]]
    tables: Mapping[int, torch.Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Inventory:
        """The inventory of `model` as it stands."""
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
        )

    def check(self, model: torch.nn.Module) -> None:
        """Bring back the rotary tables of the inventory, drop transformers' own cache, and compare
        the rest.

        Cost: a few ms for 300 modules; reads no tensor.

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
            del vars(model)["_cache"]  # where generation keeps a static cache, which it makes anew
        found = dict(tensors_and_modules(model))
        for name, (thing, address) in self.held.items():
            now = found.pop(name, None)
            if now is not thing or _address(now) != address:
                _refuse(name, "is gone" if now is None else "was replaced or moved", thing)
            if name in self.fixed and _version(now) != self.fixed[name]:
                _refuse(name, "was written to", thing)
        for name, thing in found.items():
            _refuse(name, "was added", thing)
        settings = dict(_settings(model))
        for name in settings.keys() | self.settings.keys():
            before, after = self.settings.get(name), settings.get(name)
            # a plain value that is new is a note to oneself; a hook or a method that is new
            # computes
            new = before is None and isinstance(after, (bool, int, float, str))
            if before is not after and before != after and not new:
                raise EngineError(
                    f"`{name}` was changed since the pair was loaded: it was {_shown(before)}, and"
                    f" is {_shown(after)}",
                    "an evaluator must leave the model as it found it, in evaluation mode and"
                    " without hooks",
                )


def _rewrites(rotary: torch.nn.Module) -> bool:
    """Whether the tables of `rotary` depend on the length of the text."""
    return any(kind in str(rotary.rope_type) for kind in ("dynamic", "longrope"))


def _refuse(name: str, what: str, thing: object) -> None:
    raise EngineError(
        f"`{name}` {what} since the pair was loaded: a {type(thing).__name__} that may not be what"
        " λ says",
        "do not tie, move, convert, patch or reload the model after pa_fast.load, and leave nothing"
        " on it; load the pair again",
    )


def tensors_and_modules(model: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Names and objects in the order of the model; a tied one by each of its names."""
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
    """What shapes the function beside tensors: plain values, hooks and methods on instances, by
    name."""
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
    """`weight` for classes whose objects can hold weights or what was computed from them, and two
    kinds of containers."""
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

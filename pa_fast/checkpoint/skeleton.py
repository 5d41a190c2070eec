"""The model class of a checkpoint without weights, and the names that checkpoint tensors have in
it.

transformers renames, stacks, splits and transposes tensors while it loads. Its own tables say how;
nothing here knows an architecture.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.config import model_class

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Placed:
    """The place of a checkpoint tensor in a model.

    Attributes:
        key: its name in the checkpoint.
        target: the model tensor that it becomes, or the first of those that it is split into.
        pattern: the pattern of the conversion that makes `target` of it; None where it is only
            renamed.
        order: its place among the tensors of this `target` and `pattern`.
    """

    key: str
    target: str
    pattern: str | None
    order: int


@dataclass(frozen=True)
class Traced:
    """Where the tensors of a model come from.

    Attributes:
        placed: model name → checkpoint tensors that it is made of, in the order in which
            transformers takes them.
        unplaced: checkpoint names that have no place in the model.
    """

    placed: Mapping[str, Sequence[Placed]]
    unplaced: tuple[str, ...]


class Skeleton:
    """A transformers model on the meta device, with its conversion tables.

    Attributes:
        model: the model.
        tensors: its parameters and persistent buffers by name, every name of a tied one.
    """

    def __init__(self, model: Any):
        self.model = model
        self.tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)

    @classmethod
    def of(cls, config: Mapping[str, Any], other: Mapping[str, Any]) -> Skeleton | None:
        """The model that `config` describes; None where transformers has no class for it, or the
        class refuses.

        Args:
            other: the configuration that names the class where `config` does not.
        """
        import torch
        import transformers
        from transformers import initialization
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        named = model_class(config, other)
        safe = getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
        try:
            made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
            with torch.device("meta"), initialization.no_init_weights(), safe(), _quiet():
                if named is None:
                    return cls(
                        transformers.AutoModelForCausalLM.from_config(made, trust_remote_code=False)
                    )
                kind = getattr(transformers, named)
                # a configuration may name anything that transformers has, and only a model's class
                # is to be called
                return (
                    cls(kind(made))
                    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
                    else None
                )
        except (
            Exception
        ):  # an unknown class or a malformed configuration: names are then compared as they are
            return None

    def trace(self, keys: Iterable[str]) -> Traced:
        """Where each of the checkpoint's `keys` goes."""
        from transformers.core_model_loading import dot_natural_key

        renamings, converters = self._rules()
        placed: dict[str, list[Placed]] = {}
        unplaced = []
        # the order of transformers: a rule may depend on what it saw before, and stacks are in this
        # order
        for key in sorted(dict.fromkeys(keys), key=dot_natural_key):
            name, pattern = self._renamed(key, renamings, converters)
            if name not in self.tensors:
                unplaced.append(key)
                continue
            same = placed.setdefault(name, [])
            same.append(Placed(key, name, pattern, sum(one.pattern == pattern for one in same)))
        return Traced(placed, tuple(unplaced))

    def is_ignored(self, name: str) -> bool:
        """Whether the model class says that a checkpoint may hold `name`, and that it does not use
        it."""
        renamed = self._renamed(name, *self._rules())[0]
        return any(re.search(pattern, renamed) for pattern in self._ignored)

    @functools.cached_property
    def converters(self) -> dict[str, Any]:
        """Pattern → the conversion that takes tensors of it."""
        return {pattern: one for one in self._rules()[1] for pattern in one.source_patterns}

    def convert(
        self, converter: Any, target: str, parts: Iterable[tuple[str, str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The tensors that `converter` makes of `parts` (name, pattern, tensor), by name; its first
        one is `target`."""
        own = copy.deepcopy(converter)
        for name, pattern, tensor in parts:
            own.add_tensor(target, name, pattern, tensor)
        made = own.convert(target, model=self.model, config=self.model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }

    @functools.cached_property
    def _ignored(self) -> set[str]:
        patterns = set(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        buffers = [buffer for buffer, _ in self.model.named_buffers()]
        # transformers adds these two by itself, for models that compute such buffers
        if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(buffer.endswith("position_ids") for buffer in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return patterns

    def _renamed(
        self, key: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, self.tensors)
        if name not in self.tensors and key in self.tensors:
            return key, None
        return name, pattern

    def _rules(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(self.model)
        return (
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            [rule for rule in rules if isinstance(rule, WeightConverter)],
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers on stderr about a model that is never run."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)

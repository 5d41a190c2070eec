"""Which checkpoint tensor becomes which tensor of a model: transformers' own renaming and conversion rules, asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import UsageError


@dataclass(frozen=True)
class Traced:
    """Where the tensors of a model come from.

    Attributes:
        names: live name → checkpoint names that it is made of, in the order of the checkpoint.
        converted: live names whose elements do not lie as in a checkpoint tensor: fused, split or transposed.
    """

    names: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]

    def check_elementwise(self, live: Mapping[str, object]) -> None:
        """Refuse live tensors, of which a tied one has several names, whose elements do not lie as in the checkpoint: noise goes
        by their places there.

        Raises:
            UsageError: a tensor is converted, or comes from nowhere.
        """
        known = {id(tensor) for name, tensor in live.items() if name in self.names}
        for name, tensor in live.items():
            parts = self.names.get(name, ())
            if name in self.converted or id(tensor) not in known:
                more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
                made = f"makes of `{parts[0]}`{more}" if parts else "makes of other tensors"
                raise UsageError(
                    f"stochastic rounding of `{name}`, which transformers {made}: its elements lie otherwise",
                    "use rounding nearest, or merge to disk with stochastic rounding",
                )


def trace(module: Any, keys: Iterable[str]) -> Traced:
    """Where each of the checkpoint's `keys` goes in `module`, a transformers model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted = module.state_dict(keep_vars=True)
    names: dict[str, list[str]] = {}
    converted = set()
    for key in dict.fromkeys(keys):
        name, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        names.setdefault(name, []).append(key)
        if pattern is not None or len(names[name]) > 1:
            converted.add(name)
    return Traced({name: tuple(found) for name, found in names.items()}, frozenset(converted))

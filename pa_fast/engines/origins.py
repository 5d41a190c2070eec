"""Which checkpoint tensor becomes which tensor of a model: transformers' own renaming and
conversion rules, asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.checkpoint.names import Skeleton
from pa_fast.errors import UsageError


@dataclass(frozen=True)
class Traced:
    """Where the tensors of a model come from.

    Attributes:
        names: live name → checkpoint names that it is made of, in the order of the checkpoint.
        converted: live names whose elements do not lie as in a checkpoint tensor: fused, split or
            transposed.
    """

    names: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]

    def check_elementwise(self, live: Mapping[str, object]) -> None:
        """Refuse live tensors, of which a tied one has several names, whose elements do not lie as
        in the checkpoint: noise goes by their places there.

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
                    f"stochastic rounding of `{name}`, which transformers {made}: its elements lie"
                    " otherwise",
                    "use rounding nearest, or merge to disk with stochastic rounding",
                )


def trace(module: Any, keys: Iterable[str]) -> Traced:
    """Where each of the checkpoint's `keys` goes in `module`, a transformers model."""
    keys = tuple(keys)
    order = {key: place for place, key in enumerate(keys)}
    placed = Skeleton(module).trace(keys).placed
    return Traced(
        {
            name: tuple(sorted((part.key for part in parts), key=order.__getitem__))
            for name, parts in placed.items()
        },
        frozenset(
            name for name, parts in placed.items() if len(parts) > 1 or parts[0].pattern is not None
        ),
    )


def of_pair(module: Any, base: Iterable[str], instruct: Iterable[str]) -> Traced:
    """Where each tensor of `module` comes from, in instruct's names; in base's where instruct's
    files have nothing for it.

    A merge has instruct's names and layout, and rules and noise go by these.
    """
    left, right = trace(module, base), trace(module, instruct)
    return Traced(
        {**left.names, **right.names}, right.converted | (left.converted - right.names.keys())
    )

"""Where in a model a tensor sits, read from its name: no table of architectures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The layer, None outside all layers, and the module, which is the same text in every layer.

    `model.layers.12.mlp.experts.3.up_proj.weight` is module `model.layers.mlp.experts.*.up_proj` of
    layer 12.
    """

    layer: int | None
    module: str


def place(name: str) -> Place:
    """The place of tensor `name`: its first number is the layer, every further one (an expert)
    stands for all of its kind."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [
        at for at, part in enumerate(parts) if part.isascii() and part.isdigit() and len(part) < 10
    ]
    if not numbers:
        return Place(None, ".".join(parts))
    first, *others = numbers
    kept = ["*" if at in others else part for at, part in enumerate(parts) if at != first]
    return Place(int(parts[first]), ".".join(kept))


def short_names(modules: Iterable[str], layered: Iterable[str]) -> dict[str, str]:
    """`modules` as people call them: those in `layered` without the beginning that all of these
    share."""
    inside = list(layered)
    split = [module.split(".")[:-1] for module in inside]
    shared = 0
    while split and all(
        len(parts) > shared and parts[shared] == split[0][shared] for parts in split
    ):
        shared += 1
    return {
        module: ".".join(module.split(".")[shared:]) if module in inside else module
        for module in modules
    }

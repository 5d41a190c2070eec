"""Group and layer of a tensor, read from its name, without tables of architectures."""

from __future__ import annotations

import re

GROUPS = {
    "norms": re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE),
    "embeddings": re.compile(r"embed|^wte$|^wpe$|^lm_head$", re.IGNORECASE),
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward|expert|(^|_)moe$|^fc\d+$|^ff$", re.IGNORECASE),
}
"""Patterns for one part of a dotted name, in order: a name belongs to the first group that one of
its parts matches. Embeddings are the vocabulary's tables, the output head among them, so that a
tied and an own head are alike."""


def group(name: str) -> str | None:
    """Return the group of GROUPS that a tensor name belongs to, or None."""
    return next(
        (known for known, part in GROUPS.items() if any(map(part.search, name.split(".")))), None
    )


def layer(name: str) -> tuple[str, int] | None:
    """Return the part of a tensor's name before the first number, which names the stack of layers,
    and that number, the layer; None if there is none."""
    parts = name.split(".")
    index = next(
        (
            index
            for index, part in enumerate(parts)
            if part.isascii() and part.isdigit() and len(part) < 9
        ),
        None,
    )
    return None if index is None else (".".join(parts[:index]), int(parts[index]))

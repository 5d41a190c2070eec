"""An output head that one side ties to its embedding and the other stores: the merge has a head of its own.

The tied side's head is its embedding, so W(λ) of the head is the merge of that embedding with the stored head, and the
merged configuration says `tie_word_embeddings: false`. At the tied end the two are equal, and the model is that side's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.checkpoint.config import ties
from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.header import TensorInfo
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.checkpoint.rows import vocabulary_sizes
from pa_fast.errors import PairError

_HEADS = ("lm_head.weight", "embed_out.weight")
KEY = "tie_word_embeddings"


@dataclass(frozen=True)
class TiedHead:
    """The tensor `name`, which `side` does not store: there it is the tensor `embedding`."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        return f"{quoted(self.name)} is tied in {self.side} only: the merge has a head of its own"


def tied_head(base: Checkpoint, instruct: Checkpoint) -> TiedHead | None:
    """The head that one side alone stores, if that is the only tensor that the other lacks.

    Raises:
        PairError: the side without a head says that it has one, or its embedding cannot be told; or the side with a head
            says that it is tied, so that nobody knows which of the two weights its model uses.
    """
    for side, lacking, having in (("base", base, instruct), ("instruct", instruct, base)):
        only = [name for name in having.tensors if name not in lacking.tensors]
        if len(only) != 1 or not only[0].endswith(_HEADS):
            continue
        (name,) = only
        if ties(lacking.config) is False:
            raise PairError(
                f"{lacking.folder}: lacks {quoted(name)}, and its config.json does not tie it, expected one of both",
                "complete the download, or correct its config.json",
            )
        if ties(having.config) is True:
            raise PairError(
                f"{having.folder}: stores {quoted(name)}, but its config.json ties the head, expected one of both",
                f"remove {quoted(name)} from its files, or set {KEY} to false in its config.json",
            )
        return TiedHead(name, side, _embedding(lacking, having.tensors[name]))
    return None


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the head said to be untied, wherever a loader may look."""
    made = {**config, KEY: False}
    for name, part in config.items():
        if isinstance(part, Mapping) and (KEY in part or name == "text_config"):
            made[name] = {**part, KEY: False}
    return made


def _embedding(checkpoint: Checkpoint, head: TensorInfo) -> str:
    """The one tensor with vocabulary rows as wide as `head`'s."""
    sizes = vocabulary_sizes(checkpoint.config)
    shaped = {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    found = [name for name, (rows, width) in shaped.items() if rows in sizes and width == head.shape[-1]]
    if len(found) != 1:
        listed = ", ".join(map(quoted, found[:3])) or "none"
        raise PairError(
            f"{checkpoint.folder}: its head {quoted(head.name)} is tied, expected one embedding of shape {list(head.shape)}, "
            f"found {listed}",
            "save this side with a head of its own (tie_word_embeddings: false)",
        )
    return found[0]

"""An output head that one side ties to its embedding and the other stores: the merge has a head of
its own.

The tied side's head is its embedding, so W(λ) of the head is the merge of that embedding with the
stored head, and the merged configuration says `tie_word_embeddings: false`. At the tied end the two
are equal, and the model is that side's.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
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
OTHER = {"base": "instruct", "instruct": "base"}


@dataclass(frozen=True)
class TiedHead:
    """The tensor `name`, which `side` does not store: there it is the tensor `embedding`."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        return f"{quoted(self.name)} is tied in {self.side} only: the merge has a head of its own"


@dataclass(frozen=True)
class StoredTwice:
    """The tensor `name`, which `side` alone stores, and which has the bits of the embedding that it
    is tied to."""

    name: str
    side: str
    embedding: str

    def __str__(self) -> str:
        equal = (
            f"{quoted(self.name)}, which {self.side} alone stores, equals {quoted(self.embedding)}"
        )
        return f"{equal}: it is tied on both sides, and left out"


def is_head(name: str) -> bool:
    """Whether `name` is that of an output head."""
    return name.endswith(_HEADS)


def tied_head(
    base: Checkpoint, instruct: Checkpoint, apart: Container[str] = ()
) -> TiedHead | StoredTwice | None:
    """The head that one side alone stores, if that is the only tensor that the other lacks.

    A side that ties its head and stores it all the same has one of its own where the two weights
    differ, as in transformers.

    Args:
        apart: tensors that do not count.

    Cost: headers; reads head and embedding of a side that ties and stores it.

    Raises:
        PairError: the side without a head says that it has one, or its embedding cannot be told.
    """
    for side, lacking, having in (("base", base, instruct), ("instruct", instruct, base)):
        only = [
            name for name in having.tensors if name not in lacking.tensors and name not in apart
        ]
        if len(only) != 1 or not is_head(only[0]):
            continue
        (name,) = only
        if ties(lacking.config) is False:
            raise PairError(
                f"{lacking.folder}: lacks {quoted(name)}, and its config.json does not tie it,"
                " expected one of both",
                "complete the download, or correct its config.json",
            )
        if ties(having.config) is True:
            embedding = _embedding(having, having.tensors[name])
            if having.same_bits(name, embedding):
                return StoredTwice(name, OTHER[side], embedding)
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
    found = [
        name
        for name, (rows, width) in shaped.items()
        if rows in sizes and width == head.shape[-1] and name != head.name
    ]
    if len(found) != 1:
        listed = ", ".join(map(quoted, found[:3])) or "none"
        raise PairError(
            f"{checkpoint.folder}: its head {quoted(head.name)} is tied, expected one embedding of"
            f" shape {list(head.shape)}, found {listed}",
            "save this side with a head of its own (tie_word_embeddings: false)",
        )
    return found[0]

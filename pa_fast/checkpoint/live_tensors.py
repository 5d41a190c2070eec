"""The weights of a live transformers model under the names and in the layout of a pair's merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_fast.checkpoint.counterpart import undone
from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.pairing import Pair
from pa_fast.checkpoint.skeleton import Skeleton
from pa_fast.checkpoint.view import Conversion
from pa_fast.errors import EngineError

if TYPE_CHECKING:
    import torch


class LiveTensors:
    """What `model` holds for each tensor of the merge of `pair`.

    Raises:
        EngineError: a tensor of the merge that follows λ has no place in the model, or another
            shape there.
    """

    def __init__(self, model: Any, pair: Pair):
        skeleton = Skeleton(model)
        self._direct: dict[str, torch.Tensor] = {}
        self._made: dict[str, Conversion] = {}
        for conversion in undone(pair.instruct, skeleton, self):
            self._made |= dict.fromkeys(conversion.names, conversion)
        placed = skeleton.trace(name for name in pair.names if name not in self._made).placed
        for target, parts in placed.items():
            self._direct[parts[0].key] = skeleton.tensors[target].detach()
        self._tensors = skeleton.tensors
        for name in pair.names:
            if pair.is_lerped(name) and name not in self._made:
                own = self._direct.get(name)
                if own is None or tuple(own.shape) != pair.shapes[name]:
                    found = "no tensor" if own is None else f"shape {list(own.shape)}"
                    raise EngineError(
                        f"tensor {quoted(name)} of the merge: {found} in the model, expected shape"
                        f" {list(pair.shapes[name])}",
                        "save a model that pa_fast.load made of this pair",
                    )

    def tensor_in_memory(self, name: str) -> torch.Tensor:
        """The model's tensor `name`, in host memory."""
        return self._tensors[name].detach().cpu()

    def chunk(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Elements `start` to `stop` of the flattened tensor `name` of the merge; None where the
        model has none.

        Numerics: exact.
        """
        if name in self._made:
            return self._made[name].elements(name, start, stop)
        found = self._direct.get(name)
        return None if found is None else found.view(-1)[start:stop].cpu()

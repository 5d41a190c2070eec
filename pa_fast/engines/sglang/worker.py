"""In a rank of SGLang: the callable that its `custom_weight_loader` names.

SGLang calls it in the scheduler process of every rank, and throws away what it returns; of success
it passes on the first rank's alone. What it raises ends the scheduler, and with it the process of
the driver. So each rank writes its answer, or its error, into a file that the call names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pa_fast.engines.served.layout import NamedTensors
from pa_fast.engines.served.worker_weights import answer
from pa_fast.errors import EngineError, first_line

if TYPE_CHECKING:
    import torch

LOADER = "pa_fast.engines.sglang.worker.apply"
"""The `custom_weight_loader` of SGLang, and the `load_format` of its weight updates."""

_REFUSED = {
    "sglang.srt.layers.moe": "mixtures of experts",
    "sglang.srt.lora": "LoRA",
}
"""Packages of SGLang whose modules hold weights in ways that have not been proven."""


def apply(model: Any, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """Call a method of the `WorkerWeights` of this rank, and leave its answer. Raises nothing.

    Args:
        model: this rank's part of the model.
        named_tensors: one empty tensor, whose name is the call: JSON with `method`, `arguments`,
            `dtype`, and `answers`, the beginning of the path of the answer.
    """
    # the driver misses an answer that cannot be written
    with contextlib.suppress(Exception):
        ((text, _),) = named_tensors
        call = json.loads(text)
        stack = SglangStack(call["dtype"])
        try:
            given = answer(model, stack, call["method"], call["arguments"])
        except Exception as error:
            message = f"`{call['method']}` failed: {type(error).__name__}: {first_line(error)}"
            given = {"error": ["EngineError", message, "start the engine again"]}
        # no file that is there is written over, whoever names it
        with Path(f"{call['answers']}{stack.rank}.json").open("x", encoding="utf-8") as file:
            json.dump(given, file)


class SglangStack:
    """Implements `Stack` in a scheduler process of SGLang.

    Args:
        dtype: that the model computes in, such as `bfloat16`.
    """

    name: ClassVar[str] = "SGLang"
    keeps_weights: ClassVar[str] = "sweep this architecture with the transformers engine"

    def __init__(self, dtype: str):
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self._dtype)
        return dtype

    @property
    def world(self) -> int:
        from sglang.srt.runtime_context import get_parallel

        return int(get_parallel().tp_size)

    @property
    def rank(self) -> int:
        from sglang.srt.runtime_context import get_parallel

        return int(get_parallel().tp_rank)

    def check(self, model: Any) -> None:
        """Check the modules of `model`; the driver has checked SGLang's arguments, see
        `supported.check`.

        Raises:
            EngineError: one is of a kind that is not supported.
        """
        for path, module in model.named_modules():
            for package, what in _REFUSED.items():
                if f"{type(module).__module__}.".startswith(f"{package}."):
                    raise EngineError(
                        f"SGLang's `{path}` is of {what}, which is not supported: it has not been"
                        " shown that λ reaches every weight there",
                        "sweep this architecture with the transformers engine",
                    )

    def reload(self, model: Any, tensors: NamedTensors) -> set[str]:
        """Load `tensors` into the parameters of `model` as SGLang loads weights into a running
        engine; return the names of the parameters that were written to.

        Most of SGLang's models do not say what they loaded: the writes themselves are watched, in
        this thread. What other threads load is reported as not loaded.
        """
        import torch

        with torch.no_grad(), _watched() as written:
            model.load_weights(tensors)
        return {
            name
            for name, parameter in model.named_parameters()
            if parameter.untyped_storage().data_ptr() in written
        }

    def after_write(self, model: Any) -> None:
        """Nothing: binding refuses a model with a tensor that is made of its parameters."""


@contextlib.contextmanager
def _watched() -> Iterator[set[int]]:
    """Yield the addresses of storages that operations within the block write to, in this thread."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    written: set[int] = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = kwargs.get(argument.name)
                    if position < len(args):
                        given = args[position]
                    for tensor in given if isinstance(given, (list, tuple)) else [given]:
                        if isinstance(tensor, torch.Tensor):
                            written.add(tensor.untyped_storage().data_ptr())
            return func(*args, **kwargs)

    with Watching():
        yield written

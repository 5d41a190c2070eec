"""vLLM on a CPU packs the weights of linear layers for its matrix products and drops them: keep
them, and pack anew after each switch. On GPUs the parameters themselves are multiplied."""

from __future__ import annotations

import weakref
from typing import Any

_kept: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_weights() -> None:
    """Let linear layers that are loaded from now on keep their parameters beside the packed
    weights. Does nothing on other platforms, and nothing at a second call.

    `LinearMethod` looks the function up in its module at every call, so that this is the one place
    to change; `WorkerWeights.bind` refuses empty parameters where a release does otherwise.
    """
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    packed = utils.dispatch_cpu_unquantized_gemm
    if not current_platform.is_cpu() or hasattr(packed, "pa_fast_original"):
        return

    def keep(layer: Any, remove_weight: bool) -> None:
        packed(layer, remove_weight=False)
        _kept.add(layer)

    keep.pa_fast_original = packed  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = keep


def pack(model: Any) -> None:
    """Pack the present weights of `model`'s linear layers again."""
    if not _kept:
        return
    from vllm.model_executor.layers import utils

    for layer in model.modules():
        if layer in _kept:
            utils.dispatch_cpu_unquantized_gemm(layer, False)

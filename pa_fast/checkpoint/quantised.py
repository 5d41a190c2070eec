"""Quantised checkpoints, recognised by name: their weights are codes, and interpolating codes means nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.header import TensorInfo

_CODE_DTYPES = {"F4": "fp4", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}
_CODE_NAMES = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".weight_packed": "compressed-tensors", ".SCB": "bitsandbytes 8-bit",
    ".weight.absmax": "bitsandbytes 4-bit", ".weight.quant_map": "bitsandbytes 4-bit", ".weight_scale_inv": "fp8",
    "_proj_blocks": "mxfp4", ".W_q": "HQQ", ".codebooks": "AQLM",
}  # fmt: skip


def quantisation(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str | None:
    """What says that this checkpoint is quantised, as a phrase for a message; None where nothing does."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if isinstance(found, Mapping):
                return f"config.json has `{key}` of kind {quoted(str(found.get('quant_method', 'unknown')))}"
    for info in tensors:
        kind = _CODE_DTYPES.get(info.dtype) or ("fp8" if info.dtype.startswith("F8_") else None)
        kind = kind or next((kind for end, kind in _CODE_NAMES.items() if info.name.endswith(end)), None)
        if kind is None and info.name.endswith(".weight") and info.dtype in {"I8", "U8", "I32", "U32"}:
            kind = "integer codes"
        if kind:
            return f"tensor {quoted(info.name)} of {info.dtype} holds {kind}"
    return None

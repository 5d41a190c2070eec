"""Quantised checkpoints, recognised by name: their weights are codes, and interpolating codes means
nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.header import FLOATS, TensorInfo
from pa_fast.errors import CheckpointError

_CODE_DTYPES = {"F4": "fp4", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}
_CODE_NAMES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes 8-bit",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".weight_scale_inv": "fp8",
    "_proj_blocks": "mxfp4",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}


def check_not_quantised(
    folder: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> None:
    """Refuse a quantised checkpoint, and one whose config.json says so of weights that are not.

    Raises:
        CheckpointError: a tensor holds codes; or config.json has a quantisation key, by which a
            loader would read plain weights as codes, or quantise them.
    """
    tensors = list(tensors)
    coded = next((said for said in map(_codes, tensors) if said), None)
    keys = [
        (place, key, found)
        for place, part in (
            ("", config),
            *((f"{k}.", v) for k, v in config.items() if isinstance(v, Mapping)),
        )
        for key in ("quantization_config", "compression_config")
        if isinstance(found := part.get(key), Mapping)
    ]
    if coded:
        raise CheckpointError(
            f"{folder}: a quantised checkpoint: {coded}",
            "use the original 16- or 32-bit checkpoint",
        )
    if keys:
        place, key, found = keys[0]
        dtypes = " and ".join(sorted({info.dtype for info in tensors if info.dtype in FLOATS}))
        raise CheckpointError(
            f"{folder}: config.json has `{place}{key}` of kind"
            f" {quoted(str(found.get('quant_method', 'unknown')))}, but the weights are not"
            f" quantised: all are plain {dtypes}",
            f"remove `{place}{key}` from {folder / 'config.json'}; it was left behind when the"
            " weights were converted",
        )


def _codes(info: TensorInfo) -> str | None:
    """What says that `info` holds codes, as a phrase for a message; None where nothing does."""
    kind = _CODE_DTYPES.get(info.dtype) or ("fp8" if info.dtype.startswith("F8_") else None)
    kind = kind or next(
        (kind for end, kind in _CODE_NAMES.items() if info.name.endswith(end)), None
    )
    if kind is None and info.name.endswith(".weight") and info.dtype in {"I8", "U8", "I32", "U32"}:
        kind = "integer codes"
    return f"tensor {quoted(info.name)} of {info.dtype} holds {kind}" if kind else None

"""From live tensors and two sides to what a store encodes, and to a delta file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pa_kernels.cores import over_cores
from pa_kernels.reference import LIVE_DTYPES

from pa_fast.delta import writer
from pa_fast.delta.description import Description
from pa_fast.delta.entry import Source
from pa_fast.errors import DataError
from pa_fast.live.binding import Binding, bindings
from pa_fast.live.planner import Store, planned

if TYPE_CHECKING:
    import torch


_PIECE = 1 << 22


def encode(
    path: str | Path,
    live: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    instruct: Mapping[str, torch.Tensor],
    store: str | Store,
    *,
    via: Mapping[str, torch.dtype] | None = None,
    quick: tuple[str | None, str | None] = (None, None),
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> Description:
    """Write what `LiveWeights.bind` would hold with these arguments to a delta file, for `LiveWeights.open`.

    Args:
        live: tells names, ties, dtypes and devices; it is not written, and may be one of the sides.
        quick: fingerprints of the files of both sides, where there are files.
        overwrite: replace a file that is there.

    Raises:
        as `LiveWeights.bind`, and OutputError: the file exists or cannot be written.
    """
    chosen = planned(store)
    made = bindings(live, {"base": base, "instruct": instruct}, via or {}, written=False)
    return writer.write(path, sources(made, allow_nonfinite), chosen, quick=quick, overwrite=overwrite)


def sources(made: Iterable[Binding], allow_nonfinite: bool) -> list[Source]:
    """What a store encodes: the float tensors among the bindings.

    Raises:
        DataError: a source is not finite.
    """
    floats = [binding for binding in made if binding.live.dtype in LIVE_DTYPES]
    for binding in floats if not allow_nonfinite else ():
        for side, tensor in binding.sources.items():
            check_finite(side, binding.name, tensor)
    return [Source(b.name, b.base, b.sources["instruct"], b.live.dtype, b.live.device, b.via) for b in floats]


def check_finite(side: str, name: str, tensor: torch.Tensor) -> None:
    """Raise DataError, naming side and tensor, if a weight is NaN or infinite."""
    import torch

    flat = tensor.detach().reshape(-1)
    wide = torch.float32 if tensor.dtype == torch.float16 else None

    def finite(piece: torch.Tensor) -> bool:
        # A finite sum proves finite terms, at a third of the cost of looking at each; a sum that overflows proves nothing.
        return math.isfinite(piece.sum(dtype=wide)) or bool(torch.isfinite(piece).all())

    # torch's own threads wait for one another once per tensor: on busy cores 30 times as long
    if all(over_cores(finite, flat.split(_PIECE)) if tensor.device.type == "cpu" else [finite(flat)]):
        return
    count = int((~torch.isfinite(tensor)).sum())
    raise DataError(
        f"{side} tensor `{name}` has {count} non-finite weights of {tensor.numel()}",
        "such a checkpoint is usually broken; allow_nonfinite (--allow-nonfinite) passes them through",
    )

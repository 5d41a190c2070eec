"""Sources of a store's encoding, checked to be finite, and delta files written from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pa_kernels.cores import over_cores
from pa_kernels.reference import LIVE_DTYPES

from pa_fast.errors import DataError
from pa_fast.live.binding import Binding, bindings
from pa_fast.stores import file, registry
from pa_fast.stores.file import Description
from pa_fast.stores.store import Source, Store

if TYPE_CHECKING:
    import torch


_PIECE = 1 << 22

OnRead = Callable[["torch.Tensor", int, "torch.Tensor"], None]
"""(source, start, piece): called, from several threads, with each piece of a source that is read,
while it is in cache; `piece` begins at element `start`."""


def encode(
    path: str | Path,
    live: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    instruct: Mapping[str, torch.Tensor],
    store: str | Store,
    *,
    intermediate_dtype: Mapping[str, torch.dtype] | None = None,
    quick: tuple[str | None, str | None] = (None, None),
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> Description:
    """Write what `LiveWeights.bind` would hold with these arguments to a delta file, for
    `LiveWeights.open`.

    Args:
        live: gives names, ties, dtypes and devices; it is not written, and may be one of the sides.
        quick: fingerprints of the files of both sides, where there are files.
        overwrite: replace a delta file that is there.

    Raises:
        as `LiveWeights.bind`, and OutputError: the file exists or cannot be written.
    """
    chosen = registry.named(store)
    bound = bindings(
        live, {"base": base, "instruct": instruct}, intermediate_dtype or {}, written=False
    )
    return file.write(
        path, sources(bound, allow_nonfinite), chosen, quick=quick, overwrite=overwrite
    )


def sources(
    bound: Iterable[Binding], allow_nonfinite: bool, on_read: OnRead | None = None
) -> list[Source]:
    """Return what a store encodes: a source for each float tensor among the bindings.

    Args:
        on_read: called with each piece that is checked.

    Raises:
        DataError: a source is not finite.
    """
    floats = [binding for binding in bound if binding.live.dtype in LIVE_DTYPES]
    if not allow_nonfinite:
        check_finite(
            ((side, b.name, tensor) for b in floats for side, tensor in b.sources.items()), on_read
        )
    return [
        Source(
            b.name, b.base, b.sources["instruct"], b.live.dtype, b.live.device, b.intermediate_dtype
        )
        for b in floats
    ]


def check_finite(
    tensors: Iterable[tuple[str, str, torch.Tensor]], on_read: OnRead | None = None
) -> None:
    """Raise DataError, naming side and tensor, if a weight of (side, name, tensor) is NaN or
    infinite.

    Args:
        on_read: called with every piece.

    Cost: one pass; on a CPU one core per piece of any tensor.
    """
    import torch

    tensors = list(tensors)
    pieces = []
    for t, (_, _, tensor) in enumerate(tensors):
        step = _PIECE if tensor.device.type == "cpu" else max(tensor.numel(), 1)
        pieces += [
            (t, k * step, piece) for k, piece in enumerate(tensor.detach().reshape(-1).split(step))
        ]

    def look(one: tuple[int, int, torch.Tensor]) -> bool:
        t, start, piece = one
        if on_read is not None:
            on_read(tensors[t][2], start, piece)
        return is_finite(piece)

    # all tensors at once: torch's own threads, and ours, wait for one another at the end of each
    for (t, _, _), finite in zip(pieces, over_cores(look, pieces)):
        if not finite:
            side, name, tensor = tensors[t]
            count = int((~torch.isfinite(tensor)).sum())
            raise DataError(
                f"{side} tensor `{name}` has {count} non-finite weights of {tensor.numel()}",
                "such a checkpoint is usually broken; allow_nonfinite (--allow-nonfinite) passes"
                " them through",
            )


def is_finite(piece: torch.Tensor) -> bool:
    """Return whether no weight is NaN or infinite.

    Numerics: a finite sum has finite terms, and costs a third of a look at each; only where the sum
        is not finite are the terms looked at.
    """
    import torch

    wide = torch.float32 if piece.dtype == torch.float16 else None
    return math.isfinite(piece.sum(dtype=wide)) or bool(torch.isfinite(piece).all())

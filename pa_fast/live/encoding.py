"""From live tensors and two sides to what a store encodes, and to a delta file."""

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
"""(source, start, its elements from `start` on): told of what is read anyway, while it is in cache;
from several threads."""


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
        live: tells names, ties, dtypes and devices; it is not written, and may be one of the sides.
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
    made: Iterable[Binding], allow_nonfinite: bool, on_read: OnRead | None = None
) -> list[Source]:
    """What a store encodes: the float tensors among the bindings. `on_read` is told of what is
    looked at.

    Raises:
        DataError: a source is not finite.
    """
    floats = [binding for binding in made if binding.live.dtype in LIVE_DTYPES]
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
        on_read: told of every piece.

    Cost: one pass; on a CPU one core per piece of any tensor.
    """
    import torch

    tensors = list(tensors)
    pieces = []
    for at, (_, _, tensor) in enumerate(tensors):
        step = _PIECE if tensor.device.type == "cpu" else max(tensor.numel(), 1)
        pieces += [
            (at, k * step, piece) for k, piece in enumerate(tensor.detach().reshape(-1).split(step))
        ]

    def look(one: tuple[int, int, torch.Tensor]) -> bool:
        at, start, piece = one
        if on_read is not None:
            on_read(tensors[at][2], start, piece)
        return is_finite(piece)

    # all tensors at once: torch's own threads, and ours, wait for one another at the end of each
    for (at, _, _), well in zip(pieces, over_cores(look, pieces)):
        if not well:
            side, name, tensor = tensors[at]
            count = int((~torch.isfinite(tensor)).sum())
            raise DataError(
                f"{side} tensor `{name}` has {count} non-finite weights of {tensor.numel()}",
                "such a checkpoint is usually broken; allow_nonfinite (--allow-nonfinite) passes"
                " them through",
            )


def is_finite(piece: torch.Tensor) -> bool:
    """Whether no weight is NaN or infinite.

    A finite sum proves finite terms, at a third of the cost of looking at each; a sum that
    overflows proves nothing.
    """
    import torch

    wide = torch.float32 if piece.dtype == torch.float16 else None
    return math.isfinite(piece.sum(dtype=wide)) or bool(torch.isfinite(piece).all())

"""What weight files hold, read once more in pieces: the sum of each tensor's bytes, or whatever
else is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from pa_fast.checkpoint.header import TensorInfo
from pa_fast.checkpoint.reader import torch_dtype
from pa_fast.checkpoint.resume import chunk_sum
from pa_fast.checkpoint.streaming import cuts

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Read = Callable[[TensorInfo, int, int, "torch.Tensor"], "torch.Tensor"]
"""(tensor, start, stop, out) → its flattened elements `start` to `stop`, in `out`: as
`WeightFile.read`."""


def over_tensors(
    read: Read, infos: Iterable[TensorInfo], work: Callable[[TensorInfo, int, torch.Tensor], T]
) -> dict[TensorInfo, list[T]]:
    """`work(tensor, start, piece)` of every piece of each tensor, in order; on every core at once.

    Cost: one read of the tensors, into memory of one piece (2^19 elements) per core.
    """
    from pa_kernels.cores import Scratch, over_cores

    scratch = Scratch()
    found: dict[TensorInfo, list[T]] = {info: [] for info in infos}
    pieces = [(info, *cut) for info in found for cut in cuts(info.count)]

    def one(piece: tuple[TensorInfo, int, int]) -> T:
        info, start, stop = piece
        return work(
            info,
            start,
            read(info, start, stop, scratch.take("piece", stop - start, torch_dtype(info.dtype))),
        )

    for (info, _, _), value in zip(pieces, over_cores(one, pieces)):
        found[info].append(value)
    return found


def content_sums(read: Read, infos: Iterable[TensorInfo]) -> dict[TensorInfo, int]:
    """`pa_kernels.checksum` of the bytes of each tensor."""
    found = over_tensors(read, infos, lambda info, start, piece: chunk_sum(piece, start))
    return {info: sum(parts) % 2**64 for info, parts in found.items()}

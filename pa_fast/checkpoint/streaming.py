"""The merge of one pair, chunk by chunk: shared by the writer of merged files and by the check of
them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.pairing import Pair
from pa_fast.checkpoint.recipe import Blend
from pa_fast.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CHUNK_ELEMENTS = (
    2**19
)  # three chunks of bf16 are 3 MB: they stay in the L2 or L3 cache between the passes over them
AHEAD = 64  # chunks handed to the pool before the first of them is waited for
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def live_dtype(pair: Pair, name: str, dtype: str) -> str:
    """The safetensors dtype that tensor `name` has after a merge with option `dtype` (`auto`: that
    of instruct)."""
    own = pair.stored("instruct", name).dtype
    return own if dtype == "auto" or not pair.is_lerped(name) else DTYPES[dtype]


def check_dtype(dtype: str) -> None:
    """Raise UsageError unless `dtype` is auto, bfloat16, float16 or float32."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(
            f"dtype `{dtype}`: expected auto, {', '.join(DTYPES)}",
            "auto keeps the instruct checkpoint's dtypes",
        )


def over_chunks(
    pool: ThreadPoolExecutor,
    pair: Pair,
    names: Iterable[str],
    work: Callable[[str, int, int, Tensor, Tensor], T],
) -> Iterator[tuple[str, T]]:
    """`work(name, start, stop, base, instruct)` for every chunk of the flattened tensors `names`:
    (name, result) in order.

    The chunks are in memory that is used again: they hold these elements until `work` returns.

    Raises:
        DataError: a file changed meanwhile, or a tensor that is not merged differs between the
            sides.
    """
    from pa_kernels.cores import Scratch

    scratch = Scratch()

    def one(name: str, start: int, stop: int) -> T:
        base, instruct = (
            pair.chunk(side, name, start, stop, scratch) for side in ("base", "instruct")
        )
        if not pair.is_lerped(name) and name not in pair.single:
            _check_equal(pair, name, base, instruct)
        return work(name, start, stop, base, instruct)

    yield from in_order(
        pool, one, ((name, *cut) for name in names for cut in cuts(pair.count(name)))
    )


def cuts(count: int) -> Iterator[tuple[int, int]]:
    """Start and stop of every chunk of `count` elements."""
    return (
        (start, min(start + CHUNK_ELEMENTS, count)) for start in range(0, count, CHUNK_ELEMENTS)
    )


def in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[str, int, int], T],
    pieces: Iterable[tuple[str, int, int]],
) -> Iterator[tuple[str, T]]:
    """`work(name, start, stop)` of every piece on the pool: (name, result) in order, whatever
    tensor a piece is of."""
    waiting: deque[tuple[str, Future[T]]] = deque()
    try:
        for name, start, stop in pieces:
            waiting.append((name, pool.submit(work, name, start, stop)))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        # an error, or a caller that stops: nothing may still be writing when the files are closed
        for _, future in waiting:
            future.cancel()
        wait([future for _, future in waiting])


def merge_chunk_(
    out: Tensor, base: Tensor, instruct: Tensor, blend: Blend | None, start: int = 0
) -> None:
    """Write W(λ) of one chunk [n] into `out` [n]; a tensor that is not merged has no blend, and is
    copied.

    Args:
        start: elements of the tensor before the chunk.

    Numerics: the contract of `pa_kernels.lerp_`, into the dtype of `out`.
    """
    from pa_kernels import lerp_
    from pa_kernels.reference import Draw

    if blend is None:
        out.copy_(instruct)
    else:
        lerp_(
            [out],
            [base],
            [instruct],
            blend.lam,
            draws=[None if blend.key is None else Draw(blend.key, start)],
        )


def check_finite(
    pair: Pair, name: str, lam: float, out: Tensor, base: Tensor, instruct: Tensor, start: int = 0
) -> None:
    """Refuse a chunk, `start` elements into its tensor, whose sources, or whose merged values, are
    not all finite.

    For λ other than 0 and 1 every non-finite source weight makes its merged value non-finite, so
    one sum over `out`, which is in cache, clears all three; only a suspicious sum is looked into.

    Raises:
        DataError: names the tensor and the side.
    """
    import torch
    from pa_kernels.reference import fp32

    suspects = (base, instruct, out) if fp32(lam) in (0.0, 1.0) else (out,)
    if all(
        math.isfinite(chunk.sum(dtype=torch.float32 if chunk.dtype == torch.float16 else None))
        for chunk in suspects
    ):
        return
    where = f"tensor {quoted(name)}"
    for side, chunk in (("base", base), ("instruct", instruct)):
        stored = pair.stored(side, name)
        own = chunk[
            : max(0, stored.count - start)
        ]  # vocabulary rows past these are the other side's
        found = int((~torch.isfinite(own)).sum())
        if found:
            file = stored.file
            hint = "the checkpoint may be damaged; --allow-nonfinite merges it all the same"
            raise DataError(
                f"{file}: {where} of {side} has non-finite weights ({found} in one chunk)", hint
            )
    found = int((~torch.isfinite(out)).sum())
    if found:
        hint = "choose a dtype with a larger range, or a λ nearer to [0, 1]"
        raise DataError(
            f"{where}: {found} merged weights do not fit into"
            f" {str(out.dtype).removeprefix('torch.')}",
            hint,
        )


def _check_equal(pair: Pair, name: str, base: Tensor, instruct: Tensor) -> None:
    import torch

    if not torch.equal(base.view(torch.uint8), instruct.view(torch.uint8)):
        dtype = pair.stored("instruct", name).dtype
        found = f"tensor {quoted(name)} of {dtype} differs between base and instruct"
        raise DataError(
            f"{found}, expected equal values: only {', '.join(sorted(DTYPES))} are merged",
            "use a pair that agrees",
        )

"""The merge of one pair, chunk by chunk: shared by the writer of merged files and by the check of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from pa_fast.checkpoint.document import quoted
from pa_fast.checkpoint.pairing import Pair
from pa_fast.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CHUNK_ELEMENTS = 2**20  # three chunks of bf16 are 6 MB: they stay in the L2 or L3 cache between the passes over them
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def live_dtype(pair: Pair, name: str, dtype: str) -> str:
    """The safetensors dtype that tensor `name` has after a merge with option `dtype` (`auto`: that of instruct)."""
    own = pair.stored("instruct", name).dtype
    return own if dtype == "auto" or not pair.is_lerped(name) else DTYPES[dtype]


def check_dtype(dtype: str) -> None:
    """Raise UsageError unless `dtype` is auto, bfloat16, float16 or float32."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype `{dtype}`: expected auto, {', '.join(DTYPES)}", "auto keeps the instruct checkpoint's dtypes")


def over_chunks(pool: ThreadPoolExecutor, pair: Pair, name: str, work: Callable[[int, int, Tensor, Tensor], T]) -> Iterator[T]:
    """`work(start, stop, base, instruct)` for every chunk of the flattened tensor `name`, results in order.

    Raises:
        DataError: a file changed meanwhile, or a tensor that is not merged differs between the sides.
    """
    count = pair.count(name)

    def one(start: int) -> T:
        stop = min(start + CHUNK_ELEMENTS, count)
        base, instruct = pair.chunk("base", name, start, stop), pair.chunk("instruct", name, start, stop)
        if not pair.is_lerped(name):
            _check_equal(pair, name, base, instruct)
        return work(start, stop, base, instruct)

    yield from pool.map(one, range(0, count, CHUNK_ELEMENTS))
    pair.check_unchanged(name)


def merge_chunk_(out: Tensor, base: Tensor, instruct: Tensor, lam: float) -> None:
    """Write W(λ) of one chunk [n] into `out` [n]; tensors that are not merged are copied.

    Numerics: the contract of `pa_kernels.lerp_`, into the dtype of `out`.
    """
    import torch
    from pa_kernels import lerp_

    if instruct.dtype in (torch.bfloat16, torch.float16, torch.float32):
        lerp_([out], [base], [instruct], lam)
    else:
        out.copy_(instruct)


def check_finite(pair: Pair, name: str, lam: float, out: Tensor, base: Tensor, instruct: Tensor) -> None:
    """Refuse a chunk whose sources, or whose merged values, are not all finite.

    For λ other than 0 and 1 every non-finite source weight makes its merged value non-finite, so one sum over `out`,
    which is in cache, clears all three; only a suspicious sum is looked into.

    Raises:
        DataError: names the tensor and the side.
    """
    import torch
    from pa_kernels.reference import fp32

    suspects = (base, instruct, out) if fp32(lam) in (0.0, 1.0) else (out,)
    if all(bool(torch.isfinite(chunk.sum(dtype=torch.float32))) for chunk in suspects):
        return
    where = f"tensor {quoted(name)}"
    for side, chunk in (("base", base), ("instruct", instruct)):
        found = int((~torch.isfinite(chunk)).sum())
        if found:
            file = pair.stored(side, name).file
            hint = "the checkpoint may be damaged; --allow-nonfinite merges it all the same"
            raise DataError(f"{file}: {where} of {side} has non-finite weights ({found} in one chunk)", hint)
    found = int((~torch.isfinite(out)).sum())
    if found:
        hint = "choose a dtype with a larger range, or a λ nearer to [0, 1]"
        raise DataError(f"{where}: {found} merged weights do not fit into {str(out.dtype).removeprefix('torch.')}", hint)


def _check_equal(pair: Pair, name: str, base: Tensor, instruct: Tensor) -> None:
    import torch

    if not torch.equal(base.view(torch.uint8), instruct.view(torch.uint8)):
        dtype = pair.stored("instruct", name).dtype
        found = f"tensor {quoted(name)} of {dtype} differs between base and instruct"
        raise DataError(f"{found}, expected equal values: only {', '.join(sorted(DTYPES))} are merged", "use a pair that agrees")

"""The merge of one pair, chunk by chunk, and the values that decide its bits: shared by the writer
and by the verification of merged files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pa_fast.base import Lambda
from pa_fast.checkpoint.pair import Pair
from pa_fast.checkpoint.safetensors import quoted
from pa_fast.errors import DataError, UsageError
from pa_fast.foreign import one_line
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule, RuleLike

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TensorMerge:
    """The merge of one tensor: its λ, and the key of its noise if its rounding is stochastic."""

    lam: float
    key: int | None


@dataclass(frozen=True)
class MergeSpec:
    """One merge of a pair: the λ of all tensors, or the swept λ of `rule`, and the rounding."""

    lam: Lambda
    rounding: Rounding
    rule: LambdaRule | None = None

    @classmethod
    def of(
        cls,
        lam: Lambda | float | str,
        rounding: str | Rounding = "nearest",
        seed: int | None = None,
        rule: RuleLike | None = None,
    ) -> MergeSpec:
        """Return the merge that these arguments ask for.

        Raises:
            UsageError: one of them is not valid.
        """
        exact = Lambda(lam)
        followed = None if rule is None else LambdaRule.of(rule).at(exact)
        return cls(exact, Rounding.of(rounding, seed), followed)

    def tensor_merges(self, pair: Pair) -> dict[str, TensorMerge]:
        """Return the merge of each tensor of `pair` that follows λ, by name.

        Raises:
            UsageError: the rule does not fit the names.
        """
        names = [name for name in pair.names if pair.is_lerped(name)]
        lams = self.rule.resolve(names) if self.rule else dict.fromkeys(names, self.lam)
        return {name: TensorMerge(float(lams[name]), self.rounding.key(name)) for name in names}

    def notes(self, pair: Pair) -> tuple[str, ...]:
        """Describe the effect of each row of the rule, one line each."""
        names = [name for name in pair.names if pair.is_lerped(name)]
        return tuple(str(touch) for touch in self.rule.touched(names)) if self.rule else ()


# --- streaming

T = TypeVar("T")

# three chunks of bf16 are 6 MB: they stay in the L3 cache between the passes over them. Half of it
# takes a fifth more processor time, for the calls; twice as much, pages that are given back.
CHUNK_ELEMENTS = 2**20
AHEAD = 64  # chunks handed to the pool before the first of them is waited for
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def live_dtype(pair: Pair, name: str, dtype: str) -> str:
    """Return the safetensors dtype of tensor `name` after a merge with option `dtype` (`auto`: that
    of instruct)."""
    own = pair.stored("instruct", name).dtype
    return own if dtype == "auto" or not pair.is_lerped(name) else DTYPES[dtype]


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a live dtype: auto, bfloat16, float16 or float32; of `torch.float32` too.

    Raises:
        UsageError: it is none of these.
    """
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise UsageError(
            f"dtype `{one_line(str(dtype), 60)}`: expected auto, {', '.join(DTYPES)}",
            "auto keeps the instruct checkpoint's dtypes",
        )
    return name


def over_chunks(
    pool: ThreadPoolExecutor,
    pair: Pair,
    names: Iterable[str],
    work: Callable[[str, int, int, Tensor, Tensor], T],
) -> Iterator[tuple[str, T]]:
    """Yield (name, `work(name, start, stop, base, instruct)`) for every chunk of the flattened
    tensors `names`, in order.

    The memory of the chunks is reused: they hold these elements until `work` returns.

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
    """Return start and stop of every chunk of `count` elements."""
    return (
        (start, min(start + CHUNK_ELEMENTS, count)) for start in range(0, count, CHUNK_ELEMENTS)
    )


def in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[str, int, int], T],
    pieces: Iterable[tuple[str, int, int]],
) -> Iterator[tuple[str, T]]:
    """Run `work(name, start, stop)` of every piece on the pool, and yield (name, result) in
    order."""
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
    out: Tensor, base: Tensor, instruct: Tensor, merge: TensorMerge | None, start: int = 0
) -> None:
    """Write W(λ) of one chunk [n] into `out` [n].

    Args:
        merge: of the tensor; None copies instruct, for a tensor that is not merged.
        start: elements of the tensor before the chunk.

    Numerics: the contract of `pa_kernels.lerp_`, into the dtype of `out`.
    """
    import torch
    from pa_kernels.cores import inference, pieces
    from pa_kernels.dense import CHUNK, lerp_piece_
    from pa_kernels.reference import Draw, fp32
    from pa_kernels.switch import refuse_flushed_denormals

    if merge is None:
        out.copy_(instruct)
        return
    # the parts of `pa_kernels.lerp_` that one chunk needs: its checks and tables are made for
    # whole models, and took half as long as the arithmetic of a chunk
    refuse_flushed_denormals()
    lam = fp32(merge.lam)
    key = None if out.dtype == torch.float32 else merge.key  # which is never rounded so
    with inference():
        for piece in pieces(out.numel(), CHUNK):
            draw = None if key is None else Draw(key, start + piece.start)
            lerp_piece_(out[piece], base[piece], instruct[piece], lam, draw=draw)


def chunk_sum(chunk: Tensor, start: int) -> int:
    """Return what elements from `start` on add to the checksum of their tensor, mod 2^64."""
    from pa_kernels.checksum import CHUNK_BYTES, piece_checksum

    return piece_checksum(chunk, start * chunk.element_size() // CHUNK_BYTES)


def merge_summed_(
    out: Tensor, base: Tensor, instruct: Tensor, merge: TensorMerge | None, start: int = 0
) -> int:
    """Write W(λ) of one chunk, as `merge_chunk_` does, and return what it adds to the checksum of
    its tensor, mod 2⁶⁴: in one pass where the process has compiled loops.

    Numerics: as `merge_chunk_`, but for the payloads of NaN, which a caller refuses.
    """
    from pa_kernels.checksum import CHUNK_BYTES
    from pa_kernels.cores import inference
    from pa_kernels.dense import lerp_summed_
    from pa_kernels.reference import fp32
    from pa_kernels.switch import refuse_flushed_denormals

    if merge is not None and merge.key is None:
        refuse_flushed_denormals()
        with inference():
            chunk = start * out.element_size() // CHUNK_BYTES
            summed = lerp_summed_(out, base, instruct, fp32(merge.lam), chunk)
        if summed is not None:
            return summed[0] % 2**64
    merge_chunk_(out, base, instruct, merge, start)
    return chunk_sum(out, start)


def check_finite(
    pair: Pair, name: str, lam: float, out: Tensor, base: Tensor, instruct: Tensor, start: int = 0
) -> None:
    """Refuse a chunk, `start` elements into its tensor, with values that are not finite in the
    sources or in the merge.

    For λ other than 0 and 1 every non-finite source weight makes its merged value non-finite. So
    one sum over `out`, which is in cache, clears all three; details are read only if it is not
    finite.

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
        # later vocabulary rows are the other side's
        own = chunk[: max(0, stored.count - start)]
        count = int((~torch.isfinite(own)).sum())
        if count:
            file = stored.file
            hint = "the checkpoint may be damaged; --allow-nonfinite merges it all the same"
            raise DataError(
                f"{file}: {where} of {side} has non-finite weights ({count} in one chunk)", hint
            )
    count = int((~torch.isfinite(out)).sum())
    if count:
        hint = "choose a dtype with a larger range, or a λ nearer to [0, 1]"
        raise DataError(
            f"{where}: {count} merged weights do not fit into"
            f" {str(out.dtype).removeprefix('torch.')}",
            hint,
        )


def _check_equal(pair: Pair, name: str, base: Tensor, instruct: Tensor) -> None:
    import torch

    if not torch.equal(base.view(torch.uint8), instruct.view(torch.uint8)):
        dtype = pair.stored("instruct", name).dtype
        defect = f"tensor {quoted(name)} of {dtype} differs between base and instruct"
        raise DataError(
            f"{defect}, expected equal values: only {', '.join(sorted(DTYPES))} are merged",
            "use a pair that agrees",
        )

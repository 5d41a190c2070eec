"""Measurements of the delta of a pair, chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.base import Lambda
from pa_fast.checkpoint.pair import Pair
from pa_fast.checkpoint.safetensors import DTYPE_BITS, torch_dtype
from pa_fast.checkpoint.streaming import (
    CHUNK_ELEMENTS,
    MergeSpec,
    TensorMerge,
    check_finite,
    live_dtype,
    merge_chunk_,
)

if TYPE_CHECKING:
    import torch


Merge = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", TensorMerge], None]
"""Function `merge(out, base, instruct, tensor_merge)` that writes W(λ) of flat
tensors [N] into `out` [N], rounded to its dtype."""


@dataclass(frozen=True)
class Moved:
    """Sums over some weights at one λ: `along` is ⟨W − B, I − B⟩, `weights` the number of those
    with other bits than at λ = 0."""

    along: float
    weights: int

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.along + other.along, self.weights + other.weights)


def fidelity(
    base: torch.Tensor,
    instruct: torch.Tensor,
    merges: Sequence[TensorMerge],
    dtype: torch.dtype,
    merge: Merge = merge_chunk_,
) -> list[Moved]:
    """Measure the effect of each λ of a grid on flat tensors [N] of one pair, held in `dtype`.

    Args:
        base, instruct: [N], bf16, fp16 or fp32, any mix.
        dtype: the live dtype, which W(λ) is rounded to.
        merges: the λ of each point, all with the same noise or none.
        merge: function that computes and rounds W(λ); by default the contract, for tensors from
            their first element on.

    Numerics: W − B and I − B in fp32, dot products in fp32: call it on pieces of about a million
    elements, and add the sums.
    Cost: three passes per λ over scratch of 10 bytes per element.
    """
    import torch

    wide = base.float()
    delta = instruct.float() - wide
    out, start = torch.empty(base.numel(), dtype=dtype), base.to(dtype)
    if merges and merges[0].key is not None:
        start = torch.empty_like(out)
        merge(start, base, instruct, TensorMerge(0.0, merges[0].key))
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    moved_at = []
    for tensor_merge in merges:
        merge(out, base, instruct, tensor_merge)
        count = int(torch.count_nonzero(out.view(kind) != start.view(kind)))
        moved_at.append(Moved(float(torch.dot(out.float() - wide, delta)), count))
    return moved_at


# --- delta sums
#
# k is the distance of two weights of one sign on the grid of the live dtype: the difference of
# their bit patterns as integers, so |k| = 1 means neighbours.

BUCKETS = 33
"""|k| = 0 is bucket 0, and 2^(n−1) ≤ |k| < 2^n is bucket n: up to 16 of bf16 and fp16, 32 of
fp32."""
SMALL_CODE, LARGE_CODE = 63, 8191
"""The largest |k| of the 8-bit and of the 16-bit codes of a packed store."""


@dataclass(frozen=True)
class DeltaSums:
    """Sums over `weights` elements of a pair. They can be added in any order.

    Attributes:
        base_square, delta_square: ‖B‖² and ‖I − B‖².
        unchanged: elements with equal values and signs on both sides.
        sign_crossings, binade_crossings: elements whose sign, or exponent, differs at the live
            dtype.
        histogram: elements of equal sign by |k|; see `BUCKETS`.
        no_small_code, no_large_code: elements that 8-bit, or 16-bit, codes of a packed store cannot
            represent.
        inexact: elements that the live dtype cannot hold exactly on some side.
        moved: sums for each λ of a grid.
    """

    weights: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    unchanged: int = 0
    sign_crossings: int = 0
    binade_crossings: int = 0
    no_small_code: int = 0
    no_large_code: int = 0
    inexact: int = 0
    histogram: tuple[int, ...] = (0,) * BUCKETS
    moved: tuple[Moved, ...] = ()

    def __add__(self, other: DeltaSums) -> DeltaSums:
        pairs = [
            (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        ]
        return DeltaSums(*(_added(a, b) for a, b in pairs))

    def scaled(self, weights: int) -> DeltaSums:
        """Return these sums, of a sample, as an estimate over `weights` elements; unchanged if they
        are of all elements."""
        if weights == self.weights or not self.weights:
            return self
        share = weights / self.weights
        return DeltaSums(
            *(_scaled(getattr(self, field.name), share) for field in dataclasses.fields(self))
        )


def _scaled(value: Any, share: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(one, share) for one in value)
    if isinstance(value, Moved):
        return Moved(value.along * share, round(value.weights * share))
    return round(value * share) if isinstance(value, int) else value * share


def _added(a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(x + y for x, y in zip(a, b)) if a and b else a or b
    return a + b


def delta_sums(
    base: torch.Tensor,
    instruct: torch.Tensor,
    dtype: torch.dtype,
    merges: Sequence[TensorMerge] = (),
    merge: Merge = merge_chunk_,
) -> DeltaSums:
    """Return the sums of flat tensors [N], bf16, fp16 or fp32, that are held in `dtype`, with
    `fidelity` of each of `merges`.

    Numerics: fp32 dot products: call it on pieces of about a million elements, and add.
    Cost: about thirty passes over scratch of the size of the piece in fp32, and three per λ.
    """
    import torch

    wide_b, wide_i = base.float(), instruct.float()
    delta = wide_i - wide_b
    live_b, live_i = base.to(dtype), instruct.to(dtype)
    kind, low, exponents, unsigned = {
        torch.bfloat16: (torch.int16, 7, 0x7F80, 0x7FFF),
        torch.float16: (torch.int16, 10, 0x7C00, 0x7FFF),
        torch.float32: (torch.int32, 23, 0x7F800000, 0x7FFFFFFF),
    }[dtype]
    bits_b, bits_i = live_b.view(kind), live_i.view(kind)
    differing = bits_b ^ bits_i
    crossed = differing < 0
    wider = torch.int64 if kind == torch.int32 else torch.int32
    distance = (bits_i.to(wider) - bits_b.to(wider)).abs_()
    sizes = bits_b & unsigned, bits_i & unsigned
    normal = (torch.minimum(*sizes) >= 1 << low) & (torch.maximum(*sizes) < exponents)
    coded = normal.logical_or_(distance == 0) & ~crossed
    inexact = 0
    if not base.dtype == instruct.dtype == dtype:
        inexact = _count((live_b.float() != wide_b) | (live_i.float() != wide_i))
    return DeltaSums(
        weights=base.numel(),
        base_square=float(torch.dot(wide_b, wide_b)),
        delta_square=float(torch.dot(delta, delta)),
        unchanged=_count(wide_b.view(torch.int32) == wide_i.view(torch.int32)),
        sign_crossings=_count(crossed),
        binade_crossings=_count(differing & exponents),
        no_small_code=base.numel() - _count(coded & (distance <= SMALL_CODE)),
        no_large_code=base.numel() - _count(coded & (distance <= LARGE_CODE)),
        inexact=inexact,
        histogram=_histogram(distance, crossed),
        moved=tuple(fidelity(base, instruct, merges, dtype, merge)) if merges else (),
    )


def _count(flags: torch.Tensor) -> int:
    import torch

    return int(torch.count_nonzero(flags))  # `sum` would first make int64 of them


def _histogram(distance: torch.Tensor, left_out: torch.Tensor) -> tuple[int, ...]:
    """Return how many int32 or int64 numbers [N] have each number of binary digits; those
    `left_out` are not counted."""
    import torch

    # the exponent of a float is the number of digits: int32 ones have 16 at most, which fp32 holds
    # exactly
    if distance.dtype == torch.int64:
        digits = (distance.double().view(torch.int64) >> 52) - 1022
    else:
        digits = (distance.float().view(torch.int32) >> 23) - 126
    digits.clamp_min_(0).masked_fill_(left_out, BUCKETS)
    return tuple(torch.bincount(digits, minlength=BUCKETS + 1)[:BUCKETS].tolist())


# --- store size


@dataclass(frozen=True)
class StoreSize:
    """Bytes beside the live copy, by store. `sparse` and `packed` equal `dense` if a tensor cannot
    be held so, or that does not pay."""

    dense: int = 0
    sparse: int = 0
    packed: int = 0

    def __add__(self, other: StoreSize) -> StoreSize:
        return StoreSize(
            self.dense + other.dense, self.sparse + other.sparse, self.packed + other.packed
        )


def store_size(sums: DeltaSums, item_bytes: tuple[int, int], live: str) -> StoreSize:
    """Return the bytes that a tensor would take in each store, from counts alone.

    Stores are a layer above, and cannot answer from counts: their `estimate` encodes samples of
    tensors, and importing them imports torch, which `inspect` of headers must not. So this is the
    only place outside `stores` that knows what they keep. Bytes are those of the kernels' formats,
    and tests/checkpoint/test_measure.py compares them with what the stores encode.

    Args:
        sums: over all of its elements, or scaled to as many.
        item_bytes: of one element of base and of instruct, in their files.
        live: safetensors dtype of the live tensor.
    """
    from pa_kernels.packed import packed_bytes
    from pa_kernels.sparse import sparse_bytes

    numel, both = sums.weights, sum(item_bytes)
    dense = numel * both
    packed = [dense]
    if not sums.inexact and live in ("BF16", "F16"):
        packed += [
            packed_bytes(numel, sums.no_small_code, 8),
            packed_bytes(numel, sums.no_large_code, 16),
        ]
    sparse = sparse_bytes(numel, numel - sums.unchanged, both)
    return StoreSize(dense, min(dense, sparse), min(packed))


# --- module path


@dataclass(frozen=True)
class ModulePath:
    """The layer of a tensor, None outside all layers, and its module, the same text in every layer.

    `model.layers.12.mlp.experts.3.up_proj.weight` is module `model.layers.mlp.experts.*.up_proj` of
    layer 12.
    """

    layer: int | None
    module: str


def module_path(name: str) -> ModulePath:
    """Return the path of tensor `name`, read from the name alone: its first number is the layer;
    every further one (an expert) is written `*`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [
        index
        for index, part in enumerate(parts)
        if part.isascii() and part.isdigit() and len(part) < 10
    ]
    if not numbers:
        return ModulePath(None, ".".join(parts))
    first, *others = numbers
    kept = ["*" if index in others else part for index, part in enumerate(parts) if index != first]
    return ModulePath(int(parts[first]), ".".join(kept))


def short_names(modules: Iterable[str], layered: Iterable[str]) -> dict[str, str]:
    """Return short names of `modules`: those in `layered` without the beginning that they all
    share."""
    inside = list(layered)
    split = [module.split(".")[:-1] for module in inside]
    shared = 0
    while split and all(
        len(parts) > shared and parts[shared] == split[0][shared] for parts in split
    ):
        shared += 1
    return {
        module: ".".join(module.split(".")[shared:]) if module in inside else module
        for module in modules
    }


# --- measure

BLOCKS, BLOCK_ELEMENTS = 16, 4096
"""Blocks and elements of each in a sample of a tensor, evenly spaced; a smaller tensor is read
whole."""


@dataclass(frozen=True)
class Fidelity:
    """The effect of one λ on a part.

    Attributes:
        effective_lambda: the λ that it acts like; None if base and instruct do not differ.
        moved: the share of weights that it moves.
        intended_lambda: the λ that it would act like without rounding: itself, or under a rule the
            mean of the tensors' λ, weighted by ‖I − B‖²; None if these λ differ, but base and
            instruct do not.
    """

    lam: str
    effective_lambda: float | None
    moved: float
    intended_lambda: float | None


@dataclass(frozen=True)
class MeasuredPart:
    """A tensor, all tensors of one module, or all of a model, over the weights that follow λ and
    that both sides have.

    Attributes:
        name: of the tensor or module; `layer` is None outside layers, and for modules.
        parameters, measured: number of weights, and of those that were read; shares and sums are
            for all weights.
        relative_norm: ‖I − B‖ / ‖B‖, None if B is zero.
        unchanged, sign_crossings, binade_crossings: shares of the weights that are equal on both
            sides, and whose sign or exponent differs at the live dtype.
        histogram: weights of equal sign by |k|, k = bits(I) − bits(B): 0, 1, 2–3, 4–7, …
        stores: bytes beside the live copy, by store.
        fidelity: for each λ of the grid.
    """

    name: str
    layer: int | None
    module: str
    parameters: int
    measured: int
    relative_norm: float | None
    unchanged: float
    sign_crossings: float
    binade_crossings: float
    histogram: tuple[int, ...]
    stores: StoreSize
    fidelity: tuple[Fidelity, ...]


def joint_norm(parts: Iterable[MeasuredPart]) -> float | None:
    """Return ‖I − B‖ / ‖B‖ of several tensors of about one size (experts) together: the root of the
    mean of squares; None where none is known."""
    norms = [part.relative_norm for part in parts if part.relative_norm is not None]
    return math.sqrt(sum(norm**2 for norm in norms) / len(norms)) if norms else None


@dataclass(frozen=True)
class Measured:
    """Measurements of a pair: `total`, one part per module in the order of the files, and one per
    tensor."""

    total: MeasuredPart
    modules: tuple[MeasuredPart, ...]
    tensors: tuple[MeasuredPart, ...]

    @property
    def is_sampled(self) -> bool:
        """True if some weights were not read."""
        return self.total.measured < self.total.parameters


@dataclass(frozen=True)
class _Tensor:
    name: str
    measured: int
    sums: DeltaSums
    stores: StoreSize
    lams: tuple[float, ...]


def measure(
    pair: Pair,
    dtype: str,
    grid: Sequence[MergeSpec],
    *,
    sample: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Read all of a pair, or a sample of every tensor, and sum up the difference of the two sides.

    Args:
        dtype: the live dtype, as for a merge.
        grid: the merges, at several λ with one rule and one rounding, whose fidelity is measured.
        progress: called with (bytes read, bytes in all).

    Numerics: see `delta_sums`; sums of pieces in fp64, in order.
    Cost: one pass over both sides, or 65,536 elements per tensor; memory of a few chunks per core.

    Raises:
        DataError: non-finite weights, or a file that changed.
        UsageError: the rule does not fit the names.
    """
    from pa_kernels.cores import cores

    names = [name for name in pair.names if pair.is_lerped(name) and _common(pair, name)]
    plans = {name: list(_pieces(_common(pair, name), sample)) for name in names}
    read_bytes = {
        name: sum(b - a for piece in plans[name] for a, b in piece) * _both_bytes(pair, name)
        for name in names
    }
    merges_by_lam = [spec.tensor_merges(pair) for spec in grid]
    lams = [spec.lam for spec in grid]
    done, total = 0, sum(read_bytes.values())
    tensors = []
    with cores() as pool:
        for name in names:
            live = live_dtype(pair, name, dtype)
            tensor_merges = [merges[name] for merges in merges_by_lam]
            sums = DeltaSums()
            for part in pool.map(
                lambda piece, name=name, live=live, tensor_merges=tensor_merges: _sums(
                    pair, name, piece, live, tensor_merges
                ),
                plans[name],
            ):
                sums += part
            pair.check_unchanged(name)
            pair.release(name)
            every = sums.scaled(_common(pair, name))
            tensors.append(
                _Tensor(
                    name,
                    sums.weights,
                    every,
                    store_size(every, _item_bytes(pair, name), live),
                    tuple(one.lam for one in tensor_merges),
                )
            )
            done += read_bytes[name]
            if progress:
                progress(done, total)
    modules: dict[str, list[_Tensor]] = {}
    for one in tensors:
        modules.setdefault(module_path(one.name).module, []).append(one)
    return Measured(
        _part("all", None, "", tensors, lams),
        tuple(_part(module, None, module, members, lams) for module, members in modules.items()),
        tuple(
            _part(one.name, module_path(one.name).layer, module_path(one.name).module, [one], lams)
            for one in tensors
        ),
    )


Piece = list[tuple[int, int]]
"""Element ranges of one tensor that are measured together."""


def _pieces(count: int, sample: bool) -> Iterator[Piece]:
    if sample and count > BLOCKS * BLOCK_ELEMENTS:
        starts = [(count - BLOCK_ELEMENTS) * block // (BLOCKS - 1) for block in range(BLOCKS)]
        yield [(start, start + BLOCK_ELEMENTS) for start in starts]
    else:
        for start in range(0, count, CHUNK_ELEMENTS):
            yield [(start, min(start + CHUNK_ELEMENTS, count))]


def _sums(
    pair: Pair, name: str, piece: Piece, live: str, merges: Sequence[TensorMerge]
) -> DeltaSums:
    def merge(
        out: torch.Tensor, base: torch.Tensor, instruct: torch.Tensor, tensor_merge: TensorMerge
    ) -> None:
        # a sample, which begins at 0, has the noise of the tensor's first elements: as good as its
        # own
        merge_chunk_(out, base, instruct, tensor_merge, piece[0][0])

    base, instruct = (_read(pair, side, name, piece) for side in ("base", "instruct"))
    sums = delta_sums(base, instruct, torch_dtype(live), merges, merge)
    if not math.isfinite(sums.base_square + sums.delta_square):
        check_finite(pair, name, 0.0, base, base, instruct)
    return sums


def _read(pair: Pair, side: str, name: str, piece: Piece) -> torch.Tensor:
    import torch

    chunks = [pair.chunk(side, name, start, stop) for start, stop in piece]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _common(pair: Pair, name: str) -> int:
    """Return the number of elements of tensor `name` that both sides have. Further vocabulary rows
    of one side have no delta."""
    return min(pair.stored(side, name).count for side in ("base", "instruct"))


def _item_bytes(pair: Pair, name: str) -> tuple[int, int]:
    base, instruct = (
        DTYPE_BITS[pair.stored(side, name).dtype] // 8 for side in ("base", "instruct")
    )
    return base, instruct


def _both_bytes(pair: Pair, name: str) -> int:
    return sum(_item_bytes(pair, name))


def _part(
    name: str, layer: int | None, module: str, members: Iterable[_Tensor], lams: Sequence[Lambda]
) -> MeasuredPart:
    members = list(members)
    sums, stores, measured = DeltaSums(), StoreSize(), 0
    for member in members:
        sums, stores, measured = (
            sums + member.sums,
            stores + member.stores,
            measured + member.measured,
        )
    whole = max(sums.weights, 1)
    return MeasuredPart(
        name=name,
        layer=layer,
        module=module,
        parameters=sums.weights,
        measured=measured,
        relative_norm=math.sqrt(sums.delta_square / sums.base_square) if sums.base_square else None,
        unchanged=sums.unchanged / whole,
        sign_crossings=sums.sign_crossings / whole,
        binade_crossings=sums.binade_crossings / whole,
        histogram=sums.histogram,
        stores=stores,
        fidelity=tuple(
            Fidelity(
                lam.key,
                moved.along / sums.delta_square if sums.delta_square else None,
                moved.weights / whole,
                _intended(
                    [member.lams[index] for member in members],
                    [member.sums.delta_square for member in members],
                ),
            )
            for index, (lam, moved) in enumerate(zip(lams, sums.moved))
        ),
    )


def _intended(lams: Sequence[float], squares: Sequence[float]) -> float | None:
    if len(set(lams)) == 1:
        return lams[0]
    whole = sum(squares)
    return sum(lam * square for lam, square in zip(lams, squares)) / whole if whole else None

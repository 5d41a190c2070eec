"""How far apart the two sides of a pair are, tensor by tensor: what `pa-fast inspect --sample` and
`--full` read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_fast.base import Lambda
from pa_fast.checkpoint.delta_sums import DeltaSums, delta_sums
from pa_fast.checkpoint.header import DTYPE_BITS
from pa_fast.checkpoint.pairing import Pair
from pa_fast.checkpoint.place import place
from pa_fast.checkpoint.reader import torch_dtype
from pa_fast.checkpoint.recipe import Blend, Recipe
from pa_fast.checkpoint.store_size import StoreSize, store_size
from pa_fast.checkpoint.streaming import CHUNK_ELEMENTS, check_finite, live_dtype, merge_chunk_

if TYPE_CHECKING:
    import torch

BLOCKS, BLOCK_ELEMENTS = 16, 4096
"""A sample of a tensor: so many blocks of so many elements, evenly placed; a smaller tensor is read
whole."""


@dataclass(frozen=True)
class Fidelity:
    """What one λ does to a part.

    Attributes:
        effective_lambda: what it acts like, None where nothing differs.
        moved: the share of weights that it moves.
        intended_lambda: what it would act like without rounding: itself, or under a rule the mean
            of the tensors' λ, each weighted by its ‖I − B‖²; None where these λ differ and nothing
            else does.
    """

    lam: str
    effective_lambda: float | None
    moved: float
    intended_lambda: float | None


@dataclass(frozen=True)
class Part:
    """A tensor, all tensors of one module, or all of a model, over the weights that follow λ and
    that both sides have.

    Attributes:
        name: of the tensor or module; `layer` is None outside layers, and of modules.
        parameters, measured: weights, and how many of them were read; shares and sums stand for all
            of them.
        relative_norm: ‖I − B‖ / ‖B‖, None where B is zero.
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


@dataclass(frozen=True)
class Measured:
    """All of a pair: `total`, one part per module in the order of the files, one per tensor."""

    total: Part
    modules: tuple[Part, ...]
    tensors: tuple[Part, ...]

    @property
    def is_sampled(self) -> bool:
        """Whether some weights were not read."""
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
    grid: Sequence[Recipe],
    *,
    sample: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Read all of a pair, or a sample of every tensor, and add up how far apart the sides are.

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
    blends = [recipe.blends(pair) for recipe in grid]
    lams = [recipe.lam for recipe in grid]
    done, total = 0, sum(read_bytes.values())
    found = []
    with cores() as pool:
        for name in names:
            live = live_dtype(pair, name, dtype)
            here = [at[name] for at in blends]
            sums = DeltaSums()
            for part in pool.map(
                lambda piece, name=name, live=live, here=here: _sums(pair, name, piece, live, here),
                plans[name],
            ):
                sums += part
            pair.check_unchanged(name)
            pair.release(name)
            every = sums.scaled(_common(pair, name))
            found.append(
                _Tensor(
                    name,
                    sums.weights,
                    every,
                    store_size(every, _item_bytes(pair, name), live),
                    tuple(at.lam for at in here),
                )
            )
            done += read_bytes[name]
            if progress:
                progress(done, total)
    modules: dict[str, list[_Tensor]] = {}
    for one in found:
        modules.setdefault(place(one.name).module, []).append(one)
    return Measured(
        _part("all", None, "", found, lams),
        tuple(_part(module, None, module, members, lams) for module, members in modules.items()),
        tuple(
            _part(one.name, place(one.name).layer, place(one.name).module, [one], lams)
            for one in found
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


def _sums(pair: Pair, name: str, piece: Piece, live: str, blends: Sequence[Blend]) -> DeltaSums:
    def merge(out: torch.Tensor, base: torch.Tensor, instruct: torch.Tensor, blend: Blend) -> None:
        # a sample, which begins at 0, has the noise of the tensor's first places: as good as that
        # of its own
        merge_chunk_(out, base, instruct, blend, piece[0][0])

    base, instruct = (_read(pair, side, name, piece) for side in ("base", "instruct"))
    found = delta_sums(base, instruct, torch_dtype(live), blends, merge)
    if not math.isfinite(found.base_square + found.delta_square):
        check_finite(pair, name, 0.0, base, base, instruct)
    return found


def _read(pair: Pair, side: str, name: str, piece: Piece) -> torch.Tensor:
    import torch

    chunks = [pair.chunk(side, name, start, stop) for start, stop in piece]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _common(pair: Pair, name: str) -> int:
    """Elements of tensor `name` that both sides have: further vocabulary rows of one side have no
    delta."""
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
) -> Part:
    members = list(members)
    sums, stores, measured = DeltaSums(), StoreSize(), 0
    for member in members:
        sums, stores, measured = (
            sums + member.sums,
            stores + member.stores,
            measured + member.measured,
        )
    whole = max(sums.weights, 1)
    return Part(
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
                    [member.lams[at] for member in members],
                    [member.sums.delta_square for member in members],
                ),
            )
            for at, (lam, moved) in enumerate(zip(lams, sums.moved))
        ),
    )


def _intended(lams: Sequence[float], squares: Sequence[float]) -> float | None:
    if len(set(lams)) == 1:
        return lams[0]
    whole = sum(squares)
    return sum(lam * square for lam, square in zip(lams, squares)) / whole if whole else None

"""Masks of the weights that a sparse delta moves, over the flat elements of a tensor, made piece by
piece.

They are functions of values, names and element numbers alone, so they do not depend on the order or
the cutting of the work.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from pa_kernels.cores import over_cores
from pa_kernels.reference import mix, same_bits
from torch import Tensor

SPAN = 1 << 20
"""Elements per unit of work: scratch of some 30 MB per core where element numbers are hashed in
int64, a third of it elsewhere."""

_ROUND = 64  # pieces whose results may wait to be taken
# a magnitude's bits are counted by their high part first, then by the low 16 within one high part
_HIGH = 16


def changed(base: Tensor, instruct: Tensor) -> Tensor:
    """Return where some λ changes the merge: where base and instruct have different bits, in fp32
    if their dtypes differ. Bool [N]."""

    def differ(b: Tensor, i: Tensor, _: int) -> Tensor:
        return ~(same_bits(b, i) if b.dtype == i.dtype else same_bits(b.float(), i.float()))

    return _mask(differ, base, instruct)


def dare_mask(name: str, base: Tensor, instruct: Tensor, density: float, seed: int) -> Tensor:
    """Return DARE's draw among the changed weights: each is kept with probability `density`. Bool
    [N].

    Element j is kept where mix(lo32(j) ^ mix(hi32(j) ^ crc32(name) ^ seed)) < density · 2³².

    Source: Yu et al., "Language Models are Super Mario", arXiv 2311.03099.
    """
    limit, key = int(density * 2**32), zlib.crc32(name.encode()) ^ seed

    def keep(b: Tensor, i: Tensor, start: int) -> Tensor:
        element = torch.arange(start, start + b.numel(), device=b.device)
        noise = mix((element & 0xFFFFFFFF) ^ mix((element >> 32) ^ key))
        return (noise < limit) & changed(b, i)

    return _mask(keep, base, instruct)


@dataclass(frozen=True)
class Cut:
    """A threshold that selects the K largest of many |I − B|: all whose fp32 bits are above `bits`,
    and the first `ties` of those equal to it."""

    bits: int
    ties: int


def largest_cut(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]], count: int) -> Cut:
    """Return the cut that selects `count` of the changed weights of all (base, instruct) in
    `pairs()`, which is called twice.

    Cost: two reads of the pairs; nothing is sorted, and nothing of their size is kept.
    """
    if count < 1:
        return Cut(2**31 - 1, 0)

    def histogram(bin_of: Callable[[Tensor], Tensor], bins: int) -> Tensor:
        total = torch.zeros(bins, dtype=torch.int64, device="cpu")
        for base, instruct in pairs():
            for counts in _parallel_map(
                lambda b, i, _: torch.bincount(bin_of(magnitude(b, i)), minlength=bins).cpu(),
                base,
                instruct,
            ):
                total += counts
        return total

    high, above = _crossing(histogram(lambda bits: bits >> _HIGH, 1 << (31 - _HIGH)), count)

    def low(bits: Tensor) -> Tensor:
        return bits[bits >> _HIGH == high] & 0xFFFF

    rest, within = _crossing(histogram(low, 1 << _HIGH), count - above)
    bits = high << _HIGH | rest
    return Cut(bits, count - above - within if bits else 0)


def above(cut: Cut, base: Tensor, instruct: Tensor) -> tuple[Tensor, Cut]:
    """Return the elements that `cut` selects, bool [N], and the cut that remains for the tensors
    after them."""
    mask = _mask(lambda b, i, _: magnitude(b, i) > cut.bits, base, instruct)
    rest = cut.ties
    for start in range(0, base.numel(), SPAN) if rest else ():
        span = slice(start, start + SPAN)
        ties = (magnitude(base[span], instruct[span]) == cut.bits).nonzero().view(-1)[:rest]
        mask[span][ties] = True
        rest -= ties.numel()
        if not rest:
            break
    return mask, Cut(cut.bits, rest)


def magnitude(base: Tensor, instruct: Tensor) -> Tensor:
    """Return the bits of |I − B| in fp32 as int32, which order as the magnitudes do, with NaN above
    all."""
    return (instruct.float() - base.float()).abs().view(torch.int32)


def _crossing(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the highest bin down to which `wanted` are counted (bin 0 if there are fewer), and the
    number above that bin."""
    down = counts.flip(0).cumsum(0)
    step = min(int((down < wanted).sum()), counts.numel() - 1)
    return counts.numel() - 1 - step, int(down[step] - counts.flip(0)[step])


def _mask(work: Callable[[Tensor, Tensor, int], Tensor], base: Tensor, instruct: Tensor) -> Tensor:
    mask = torch.empty(base.numel(), dtype=torch.bool, device=base.device)
    for start, piece in zip(range(0, base.numel(), SPAN), _parallel_map(work, base, instruct)):
        mask[start : start + SPAN] = piece
    return mask


def _parallel_map(
    work: Callable[[Tensor, Tensor, int], Tensor], base: Tensor, instruct: Tensor
) -> Iterator[Tensor]:
    """Yield `work(base, instruct, start)` of every piece of two flat tensors, in order; on a CPU
    one core per piece."""

    def one(start: int) -> Tensor:
        return work(base[start : start + SPAN], instruct[start : start + SPAN], start)

    starts = range(0, base.numel(), SPAN)
    if base.device.type != "cpu":
        yield from map(one, starts)
        return
    for first in range(0, len(starts), _ROUND):
        yield from over_cores(one, starts[first : first + _ROUND])

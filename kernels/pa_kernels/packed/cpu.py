"""The packed switch on a CPU: by one look-up a weight, or of few weights, where a table costs more,
by the pair behind each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pa_kernels import reference, switch
from pa_kernels.checksum import CHUNK_BYTES, piece_checksum
from pa_kernels.cores import Scratch, inference, over_cores, pieces
from pa_kernels.dense import lerp_piece_, torch_lerp_is_exact
from pa_kernels.packed.codes import PackedTensor
from pa_kernels.packed.state import PackedRow, State, signed
from pa_kernels.reference import MANTISSA

TransitionKey = tuple[int, torch.dtype, float, float]
"""Width of codes, dtype, λ before and after."""

FEW = 1 << 17
"""Weights up to which a switch makes no table of its steps: one takes as long as switching so many
without."""

PIECE = 1 << 18
"""Elements per unit of work: whole tiles and whole chunks of the checksum, and scratch that stays
in a core's L2."""

_scratch = Scratch()


class PackedCpuGroup(switch.SwitchGroup[PackedRow]):
    """All CPU tensors of a `Packed`."""

    def __init__(self, entries: Sequence[int], rows: Sequence[PackedRow]):
        super().__init__(entries, rows)
        self.state = State(len(rows), self.device)
        self.pieces = [
            (k, piece) for k, row in enumerate(rows) for piece in pieces(row.out.numel(), PIECE)
        ]

    def launch_(self) -> None:
        switch.refuse_flushed_denormals()
        kinds = [
            (row.entry.width, row.entry.dtype, old, new)
            for row, old, new in zip(self.rows, self.state.olds.tolist(), self.lams.tolist())
        ]
        counts: Counter[TransitionKey] = Counter()
        for kind, row in zip(kinds, self.rows):
            counts[kind] += row.out.numel()
        with inference():
            ways = {
                kind: Transition(*kind, tabled=count > FEW)
                for kind, count in counts.items()
                if kind[2] != kind[3]
            }

        def write(work: tuple[int, slice]) -> tuple[int, int]:
            k, piece = work
            with inference():
                live = self.rows[k].out[piece]
                chunk = piece.start * live.itemsize // CHUNK_BYTES
                before = piece_checksum(live, chunk)
                if kinds[k] not in ways:
                    return before, before
                switch_piece_(live, self.rows[k].entry, piece, ways[kinds[k]])
                return before, piece_checksum(live, chunk)

        befores, afters = [0] * len(self.rows), [0] * len(self.rows)
        for (k, _), (before, after) in zip(self.pieces, over_cores(write, self.pieces)):
            befores[k] += before
            afters[k] += after
        self.state.before.copy_(signed(befores))
        self.state.after.copy_(signed(afters))


class Transition:
    """Switch from λ to λ′ of codes of one width and dtype.

    Attributes:
        steps: bits(W(λ′)) − bits(W(λ)) by what stands below W(λ)'s leading one and by code: int16
            [2ʰ · codes], flat; None if not `tabled`. A pair, its merges and their roundings keep
            their proportions when both are doubled, so the exponent does not matter, and a pair
            that lies across powers of two is like any other. (They do not where a merge lies under
            the smallest normal number, which is why such pairs have no code.) Of 16-bit codes those
            of small |k| alone are in it: a table has to stay in a core's cache.
    """

    def __init__(self, width: int, dtype: torch.dtype, old: float, new: float, *, tabled: bool):
        self.dtype, self.old, self.new = dtype, old, new
        self._offsets = pattern_offsets(width, dtype, old)
        self.columns = 1 << (10 if width == 16 and dtype == torch.bfloat16 else 8)
        self.steps: Tensor | None = None
        if tabled:
            one = int(torch.ones(1, dtype=dtype, device="cpu").view(torch.int16))
            rows = 1 << MANTISSA[dtype]
            patterns = torch.arange(one, one + rows, dtype=torch.int16, device="cpu")
            codes = torch.arange(
                -self.columns // 2, self.columns // 2, dtype=torch.int16, device="cpu"
            )
            w = patterns.repeat_interleave(self.columns)
            self.steps = self.stepped(w, codes.repeat(rows))

    def stepped(self, w: Tensor, codes: Tensor) -> Tensor:
        """bits(W(λ′)) − bits(W(λ)) of patterns w of W(λ); 0 where codes say that both sides are
        equal."""
        b, i, moves = packed_sources(w, codes, self._offsets, self.dtype, self.old)
        return (
            merged(b.view(self.dtype), i.view(self.dtype), self.new).view(torch.int16) - w
        ) & moves


def switch_piece_(live: Tensor, entry: PackedTensor, piece: slice, way: Transition) -> None:
    """Switch a piece of a CPU tensor."""
    w, codes = live.view(torch.int16), entry.element_codes(piece)
    if way.steps is None:
        w += way.stepped(w, codes)
    else:
        near, places = codes, _scratch.take("places", w.numel(), torch.int32)
        far = None
        if entry.width == 16:
            near = _scratch.take("near", w.numel(), torch.int16)
            torch.clamp(codes, -way.columns // 2, way.columns // 2 - 1, out=near)
            far = (codes ^ near).nonzero().view(-1)
        places.copy_(w)
        places &= (1 << MANTISSA[entry.dtype]) - 1
        places *= way.columns
        places += near
        places += way.columns // 2
        steps = torch.index_select(way.steps, 0, places)
        if far is not None and far.numel():
            steps[far] = way.stepped(w[far], codes[far])
        w += steps
    positions, base, target = entry.exceptions(piece)
    values = torch.empty_like(base)
    lerp_piece_(values, base, target, way.new)
    w.index_copy_(0, positions, values.view(torch.int16))


def merged(b: Tensor, i: Tensor, lam: float) -> Tensor:
    """`reference.lerp` where both are finite and not −0; a side itself, or written over base."""
    if lam in (0.0, 1.0):
        return i if lam else b
    return (
        torch.lerp(b, i, lam, out=b) if torch_lerp_is_exact(b.dtype) else reference.lerp(b, i, lam)
    )


def packed_sources(
    w: Tensor, codes: Tensor, offsets: Tensor, dtype: torch.dtype, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns of base and target of what holds W(λ) in patterns w, of equal ones w itself, of
    exceptions anything; and −1 where they differ, else 0.

    In one binade W is as many units from the base as `offsets`, its `pattern_offsets`, says,
    whatever the exponent. A code does not say whether its weight is of that kind: it is not if what
    lies so far from W has the wrong parity, or does not share its binade with the target; then the
    base is solved for.
    """
    k = codes >> 1
    moves = (k | -k) >> 15
    b = w - torch.index_select(offsets, 0, codes.int() + offsets.numel() // 2)
    odd = ((b ^ (b + k)) & (-1 << MANTISSA[dtype])) | ((b ^ codes) & 1)
    apart = (odd & moves).nonzero().view(-1)
    if apart.numel():
        b[apart] = solved(w[apart], codes[apart], dtype, lam)
    return b, b + k, moves


def pattern_offsets(width: int, dtype: torch.dtype, lam: float) -> Tensor:
    """bits(W(λ)) − bits(B) of pairs that share a binade, by code from the least to the largest:
    int16 [2^width].

    fp32 keeps 24 bits of a sum whose leading one stands where the dtype's does, so it rounds
    multiples of λ to a fixed fraction of a unit, and which way a tie of the last rounding goes is a
    matter of the one parity bit.
    """
    codes = torch.arange(-(1 << (width - 1)), 1 << (width - 1), dtype=torch.int32, device="cpu")
    k, p = (codes >> 1).double(), (codes & 1).double()
    fraction = 2.0 ** (23 - MANTISSA[dtype])
    near_base = abs(lam) < 0.5
    weight = lam if near_base else reference.fp32(lam - 1)
    step = torch.round(weight * k * fraction) / fraction + (0 if near_base else k)
    return (torch.round(p + step) - p).clamp(-32768, 32767).to(torch.int16)


def solved(w: Tensor, codes: Tensor, dtype: torch.dtype, lam: float) -> Tensor:
    """The bases of weights whose pairs lie across binades, by the inverse of f in
    `reference.packed_sources`, which gives the lower of the two patterns.

    f is linear between powers of two of either side, and f(2L) = 2·f(L). So: scale W until L is in
    [1, 2) (in units of its last place [2ʰ, 2ʰ⁺¹)), choose between the two places that the upper
    one's power of two can have, solve, and take the nearest number of the right parity. W being
    rounded moves the solution by less than one, by 1/2ʰ⁺¹ at least less, which is why it is
    nearest: doubles are far more exact than that.
    """
    h = MANTISSA[dtype]
    one = 1 << h
    # fp32 is exact enough for bf16
    wide, whole, bits, bias = (
        (torch.float32, torch.int32, 23, 127) if h == 7 else (torch.float64, torch.int64, 52, 1023)
    )

    def power(exponent: Tensor) -> Tensor:
        return ((exponent + bias) << bits).view(wide)

    codes = codes.to(whole)
    magnitude, k = w.to(whole) & 0x7FFF, codes >> 1
    below = k.clamp(max=0)  # the lower one less the base
    n, p = k.abs(), ((codes ^ below) & 1).to(wide)
    up, down = torch.tensor([lam, 1.0 - lam], dtype=wide, device=w.device)
    rising = codes >= 0
    # the weights of either
    upper, lower = torch.where(rising, up, down), torch.where(rising, down, up)
    grown, j = upper * power(n >> h), (n & (one - 1)).to(wide)
    significand = ((magnitude & (one - 1)) + one).to(wide)
    least = grown * (j + one) + lower * one  # f of the power of two itself
    shift = ((significand / least).view(whole) >> bits) - bias
    y = significand * power(-shift)
    # where the upper one is beyond a power of two more than the lower one, its units are twice as
    # large
    crosses = y >= lower * (2 * one - j) + 2 * one * grown
    units = torch.where(crosses, 2 * grown, grown)
    origin = units * j + lower * one + torch.where(crosses, 0, grown * one)
    steps = 2 * torch.round(((y - origin) / (lower + units) - p) / 2) + p
    pattern = (((magnitude >> h) + shift) << h) + steps.nan_to_num(0).clamp(-32768, 32767).to(whole)
    return (pattern - below).clamp(0, 32767).to(torch.int16) | (w & -32768)

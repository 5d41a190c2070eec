"""A lossless delta beside live weights: a code of 8 or 16 bits for every weight, and both values
where no code fits.

    codes, 8 bits: word j of block s   | code of element 4096·s + 2048 + j | of element 4096·s + j |
    codes, 16 bits: word j             | code of element j |
    exceptions of tile t               starts[t] to starts[t + 1] of `where`, `base`, `target`
    crossing weights of tile t         the same of `crossing_starts` and `crossing`

A code is 2·k + p in two's complement, as `reference.packed_codes` defines it. Two planes
share a word so that on a GPU codes and weights are loaded in the same layout, 128 bits at a time,
and nothing is exchanged between threads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pa_kernels import reference
from pa_kernels.cores import inference, parallel_map, pieces
from pa_kernels.dense import lerp_piece_
from pa_kernels.parts import check_index, check_part, check_starts
from pa_kernels.reference import LIMIT, MANTISSA, PACKED_TILE, PLANE, largest

BLOCK = 2 * PLANE

LAYOUTS = ("size", "speed")

CPU_SPAN, GPU_SPAN = 1 << 18, 1 << 24
"""Elements per unit of work while encoding, whole tiles: on a CPU scratch stays in a core's cache;
on a GPU each of some 40 operations a piece writes 32 MB, which takes as long as its launch, or
longer."""


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """Codes that W(λ) of N weights needs beside W(λ′) for any λ and λ′ in a range: no copy of base
    or target is among it.

    Attributes:
        dtype: of live tensor, base and target: bf16 or fp16.
        numel: N.
        width: 8 or 16, the bits of a code.
        codes: int16; of 8 bits 2048·⌈N/4096⌉ words, of 16 bits N. Past N they are 0.
        starts: int32 [⌈N/32768⌉ + 1], exceptions before each tile, and P.
        where: uint16 [P], places of the exceptions within their tiles, ascending.
        base, target: [P], their two values. The code there is 0.
        span: fp32 [2] on the CPU, the least and the largest λ that the codes are for.
        crossing_starts: int32 [⌈N/32768⌉ + 1] as `starts`, for `crossing`; None in the layout
            `size`.
        crossing: uint16 [C], places within their tiles, ascending, of the weights to whose codes a
            GPU cannot apply the step of pairs within a binade: with base and target in two binades,
            or, where the range leaves [0, 1], W(lo) or W(hi) more than LIMIT[8] units from the
            base. None in the layout `size`, which solves for every base.

    Cost:
        1 or 2 bytes per weight, 6 per exception, 4 per tile; in the layout `speed` 2 more per
        crossing weight and 4 per tile.
    """

    dtype: torch.dtype
    numel: int
    width: int
    codes: Tensor
    starts: Tensor
    where: Tensor
    base: Tensor
    target: Tensor
    span: Tensor
    crossing_starts: Tensor | None = None
    crossing: Tensor | None = None

    @classmethod
    def encode(
        cls,
        base: Tensor,
        target: Tensor,
        span: tuple[float, float] = (0.0, 1.0),
        *,
        width: int | None = None,
        layout: str = "size",
    ) -> PackedTensor | None:
        """The delta between two tensors in codes of that width which takes fewer bytes, or in the
        layout `speed` in those of 8 bits; None where exceptions outnumber a tensor.

        Args:
            base, target: of one shape, both bf16 or both fp16, on the CPU (a read-only map of a
                file, say) or a GPU.
            span: the λ that it is for, lo and hi; [0, 1] is always among them.
            width: 8 or 16, the bits of a code; by default those that take fewer bytes in all.
            layout: `size` or `speed`, for a GPU: more bytes for fewer instructions a weight.

        Cost:
            One read of both, on a CPU one core per piece; a second one where 16-bit codes may take
            less. Beside the result scratch for CPU_SPAN elements a core, or on a GPU for GPU_SPAN:
            0.4 GB, and for a range beyond [0, 1] 1.5 GB.
        """
        sides = base.detach().reshape(-1), target.detach().reshape(-1)
        lo, hi = min(reference.fp32(span[0]), 0.0), max(reference.fp32(span[1]), 1.0)
        if layout not in LAYOUTS or (layout == "speed" and width == 16):
            raise ValueError(
                f"layout {layout!r} of {width or 8}-bit codes, expected size, or of 8 bits speed"
            )
        if layout == "speed" or width is not None:
            return _encode(*sides, width or 8, (lo, hi), layout)
        encoded = [_encode(*sides, 8, (lo, hi))]
        # 16-bit codes take a byte more for every weight: they can pay only where more than this are
        # exceptions
        if encoded[0] is None or 6 * encoded[0].count > base.numel():
            encoded.append(_encode(*sides, 16, (lo, hi)))
        kept = [one for one in encoded if one is not None]
        return min(kept, key=lambda one: one.nbytes, default=None)

    @property
    def count(self) -> int:
        """P, the exceptions."""
        return self.base.numel()

    @property
    def layout(self) -> str:
        """`speed` where crossing weights are listed, else `size`."""
        return "size" if self.crossing is None else "speed"

    @property
    def parts(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {
            field.name: value
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.parts.values())

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest λ that it is for."""
        lo, hi = self.span.tolist()
        return lo, hi

    def element_codes(self, span: slice) -> Tensor:
        """Codes of the elements `span`, which begins with a block: int16, in their order."""
        if self.width == 16:
            return self.codes[span]
        words = self.codes[span.start // 2 : -(-span.stop // BLOCK) * PLANE].view(-1, PLANE)
        codes = torch.empty(words.shape[0], 2, PLANE, dtype=torch.int16, device=words.device)
        torch.bitwise_left_shift(words, 8, out=codes[:, 0])
        codes[:, 0] >>= 8
        torch.bitwise_right_shift(words, 8, out=codes[:, 1])
        return codes.view(-1)[: span.stop - span.start]

    def exceptions(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Positions less span.start [P], base and target [P] of the exceptions in `span`, which
        begins with a tile."""
        positions, entries = _listed(self.starts, self.where, span)
        return positions, self.base[entries], self.target[entries]

    def misfit(self, base: Tensor) -> int | None:
        """The first element whose code does not hold for every λ in the range, or that is listed as
        crossing and does not or the other way round, or None: what codes from a file are asked.

        Args:
            base: the base of these codes, in any shape and dtype.

        Cost: that of making the codes: one read of both, and for a range beyond [0, 1] two merges.
        """
        flat = base.detach().view(-1)

        def first(piece: slice) -> int | None:
            with inference():
                b, codes = (
                    flat[piece].to(self.codes.device, self.dtype).view(torch.int16),
                    self.element_codes(piece),
                )
                i = b + (codes >> 1)
                expected, bad = _codes(b, i, self.dtype, self.width, self.range)
                bad |= expected ^ codes
                bad[self.exceptions(piece)[0]] = 0
                if self.crossing_starts is not None and self.crossing is not None:
                    listed = torch.zeros_like(b)
                    listed[_listed(self.crossing_starts, self.crossing, piece)[0]] = -1
                    bad |= listed ^ _crosses(b, i, self.dtype, self.range)
                return piece.start + int(bad.ne(0).byte().argmax()) if bool(bad.any()) else None

        firsts = parallel_map(first, pieces(self.numel, span_of(self.codes)), self.codes)
        return next((element for element in firsts if element is not None), None)

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same on another device, where codes and exceptions are concerned."""
        parts = {
            name: part if name == "span" else part.to(device) for name, part in self.parts.items()
        }
        return PackedTensor(self.dtype, self.numel, self.width, **parts)

    def check(self) -> None:
        """Refuse whatever would make a switch touch memory that is not the tensor's; the codes may
        be anything.

        Cost: one read of `starts` and `where`.

        Raises:
            ValueError: saying what it is and what was expected.
        """
        if self.dtype not in MANTISSA or self.width not in LIMIT:
            raise ValueError(
                f"{self.width}-bit codes of {self.dtype}, expected 8 or 16 bits and bfloat16 or"
                " float16"
            )
        tiles = -(-self.numel // PACKED_TILE)
        device = self.codes.device
        check_part("codes", self.codes, (torch.int16,), code_words(self.numel, self.width), device)
        check_part("starts", self.starts, (torch.int32,), tiles + 1, device)
        check_part("where", self.where, (torch.uint16,), self.count, device)
        check_part("base", self.base, (self.dtype,), self.count, device)
        check_part("target", self.target, (self.dtype,), self.count, device)
        check_part("span", self.span, (torch.float32,), 2, torch.device("cpu"))
        lo, hi = self.range
        if not lo <= 0 or not hi >= 1 or abs(lo) + abs(hi) == float("inf"):
            raise ValueError(f"span is [{lo:g}, {hi:g}], expected finite λ around [0, 1]")
        check_starts(self.starts, self.count)
        check_index(self.where, self.starts, PACKED_TILE, self.numel)
        if self.crossing_starts is None and self.crossing is None:
            return
        if self.crossing_starts is None or self.crossing is None or self.width != 8:
            raise ValueError(
                f"crossing weights of {self.width}-bit codes, expected 8 bits, and both lists or"
                " none"
            )
        count = self.crossing.numel()
        check_part("crossing_starts", self.crossing_starts, (torch.int32,), tiles + 1, device)
        check_part("crossing", self.crossing, (torch.uint16,), count, device)
        check_starts(self.crossing_starts, count)
        check_index(self.crossing, self.crossing_starts, PACKED_TILE, self.numel)


def span_of(tensor: Tensor) -> int:
    """Elements per unit of work where `tensor` is."""
    return CPU_SPAN if tensor.device.type == "cpu" else GPU_SPAN


def code_words(numel: int, width: int) -> int:
    """int16 words that the codes of N elements take."""
    return numel if width == 16 else -(-numel // BLOCK) * PLANE


def of_lower_parity(codes: Tensor, width: int) -> Tensor:
    """Codes whose parity bit is that of the lower of the two patterns, as earlier versions had it,
    with the base's: a copy.

    The base is the upper one where k < 0, and of another parity where k is odd. So the same step
    leads back.

    Args:
        codes: words as `PackedTensor.codes` has them, on the CPU; maybe read-only.
    """
    ones, sign = (0x0101, 7) if width == 8 else (1, 15)
    changed = torch.empty_like(codes)

    def change(piece: slice) -> None:
        with inference():
            out = torch.bitwise_right_shift(codes[piece], sign, out=changed[piece])
            out &= codes[piece] >> 1
            out &= ones
            out ^= codes[piece]

    parallel_map(change, pieces(codes.numel(), span_of(codes)), codes)
    return changed


def packed_bytes(numel: int, exceptions: int, width: int, crossing: int | None = None) -> int:
    """Bytes of a packed tensor; `crossing` weights are listed in the layout `speed` alone."""
    starts = 4 * (-(-numel // PACKED_TILE) + 1)
    lists = 6 * exceptions + starts + (0 if crossing is None else 2 * crossing + starts)
    return 2 * code_words(numel, width) + lists + 8


def _encode(
    base: Tensor,
    target: Tensor,
    width: int,
    span: tuple[float, float],
    layout: str = "size",
) -> PackedTensor | None:
    numel, dtype = base.numel(), base.dtype
    words = torch.empty(code_words(numel, width), dtype=torch.int16, device=base.device)

    def pack(piece: slice) -> tuple[Tensor, Tensor]:
        with inference():
            b, i = (_whole_blocks(side[piece].view(torch.int16)) for side in (base, target))
            codes, bad = _codes(b, i, dtype, width, span)
            if width == 16:
                words[piece] = codes[: piece.stop - piece.start]
            else:
                low, high = codes.view(-1, 2, PLANE).unbind(1)
                first = piece.start // 2
                packed = words[first : first + low.numel()].view(-1, PLANE)
                torch.bitwise_left_shift(high, 8, out=packed)
                packed |= low & 0xFF
            crossing = none
            if layout == "speed":
                crosses = _crosses(b, i, dtype, span)
                crosses &= ~bad
                crossing = crosses.nonzero().view(-1) + piece.start
            return bad.nonzero().view(-1) + piece.start, crossing

    none = torch.empty(0, dtype=torch.int64, device=base.device)
    results = [(none, none), *parallel_map(pack, pieces(numel, span_of(base)), base)]
    positions, crossing = (torch.cat(lists) for lists in zip(*results))
    if 6 * positions.numel() > 2 * numel:
        return None
    starts, where = _tiled(positions, numel)
    return PackedTensor(
        dtype,
        numel,
        width,
        words,
        starts,
        where,
        base[positions],
        target[positions],
        torch.tensor(span, dtype=torch.float32, device="cpu"),
        *(_tiled(crossing, numel) if layout == "speed" else ()),
    )


def _tiled(positions: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Ascending positions in a tensor of N elements as `starts` and `where`."""
    edges = torch.arange(0, -(-numel // PACKED_TILE) + 1, device=positions.device) * PACKED_TILE
    where = (positions % PACKED_TILE).to(torch.uint16)
    return torch.searchsorted(positions, edges).int(), where


def _listed(starts: Tensor, where: Tensor, span: slice) -> tuple[Tensor, slice]:
    """What `_tiled` lists in `span`, which begins with a tile: positions less span.start, and which
    of the entries they are."""
    first, stop = span.start // PACKED_TILE, -(-span.stop // PACKED_TILE)
    starts = starts[first : stop + 1].long()
    begin, end = starts[[0, -1]].tolist()
    offsets = torch.arange(stop - first, device=starts.device) * PACKED_TILE
    tiles = torch.repeat_interleave(offsets, starts.diff(), output_size=end - begin)
    return tiles + where[begin:end].long(), slice(begin, end)


def _codes(
    b: Tensor, i: Tensor, dtype: torch.dtype, width: int, span: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """`reference.packed_codes` of int16 patterns, in 16-bit integers alone: −1 marks what
    has no code.

    Each condition is the sign of a number, so that one `or` joins them: comparisons cost ten times
    as much as sums.
    """
    first, last = 1 << MANTISSA[dtype], largest(dtype)
    k = i - b  # wraps where the signs differ, which is found by their own bits
    bad = b ^ i
    bad |= LIMIT[width] - k.abs()
    finite = last - (b & 0x7FFF)
    bad |= last - (i & 0x7FFF)
    for side in (b, i):
        bad |= (side & 0x7FFF) - first
    if span != (0.0, 1.0):
        sides = b.view(dtype), i.view(dtype)
        apart = (i ^ b) >> MANTISSA[dtype]
        for lam in span:
            merge = _merge(*sides, lam)
            apart |= (merge.to(dtype).view(torch.int16) ^ b) >> MANTISSA[dtype]
            apart |= merge.abs() < torch.finfo(dtype).smallest_normal
        bad |= apart | -apart
    bad &= k | -k  # equal patterns need to be finite alone
    bad |= finite
    bad >>= 15
    codes = (k << 1) | (b & 1)
    codes &= ~bad
    return codes, bad


def _crosses(b: Tensor, i: Tensor, dtype: torch.dtype, span: tuple[float, float]) -> Tensor:
    """−1 for patterns whose pair lies in two binades or, where `span` leaves [0, 1], has merges
    more than LIMIT[8] units from the base; of one sign."""
    apart = (b ^ i) >> MANTISSA[dtype]
    if span != (0.0, 1.0):
        for lam in span:
            merge = _merge(b.view(dtype), i.view(dtype), lam).to(dtype).view(torch.int16)
            apart |= (LIMIT[8] - (merge - b).abs()) >> 15
        step = i - b
        apart &= (step | -step) >> 15  # of equal patterns, NaN among them, nothing is asked
    return (apart | -apart) >> 15


def _merge(b: Tensor, i: Tensor, lam: float) -> Tensor:
    """`reference.lerp` in fp32, not yet rounded to the dtype of its sides."""
    if b.device.type != "cpu":
        return reference.lerp(b, i, lam, torch.float32)
    merge = torch.empty(b.shape, dtype=torch.float32, device="cpu")
    lerp_piece_(merge, b, i, lam, None)
    return merge


def _whole_blocks(patterns: Tensor) -> Tensor:
    missing = -patterns.numel() % BLOCK
    return torch.nn.functional.pad(patterns, (0, missing)) if missing else patterns

"""The specification of every kernel in plain torch: obvious, slow, the same bits on every machine.

    lerp32(b, i, λ) = fma(λ, i − b, b)          if |λ| < 0.5
                    = fma(λ − 1, i − b, i)      otherwise
    sparse          = lerp at listed positions, nothing elsewhere
    lowrank         = fma(λ, Σ_k u_k · v_k, b)
    packed          = lerp of b and i, from bits(W), λ, bits(i) − bits(b) and a parity bit
    stochastic      = |x| plus noise of less than one ulp, cut off
    checksum        = Σ_j (word_j + FOLD · high half of word_j) · odd(j)  mod 2⁶⁴

Everything else in this package is a faster way to these numbers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LIVE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a weight may be held in, on either side and live."""

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""The integer type in which a dtype's bit pattern is compared."""

CHUNK_WORDS = 8192
"""Words that share one high factor of `odd`; a constant of the format, for a checksum is stored
beside results."""

CHECKSUM_VERSION = 2
"""Version of the checksums that are computed today; files say which one theirs are of."""

FOLD = {1: 0, 2: 0x4F1BBCDD}
"""By version of the checksum, what a word's high half is multiplied with to be added to the word;
constants of the format."""

INDEX_TILE = 1 << 16
"""Elements of a tensor that share one run of 16-bit positions; a constant of the format of sparse
tensors."""

BITMAP_TILE = 1 << 12
"""Elements of a tensor whose bits share one entry of `starts`; a constant of the format of sparse
tensors."""

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
"""Bits below the leading one of a significand, in the dtypes that can be packed."""

LIMIT = {8: 63, 16: 8191}
"""The largest |k| that a code of 8 or 16 bits stands for; a constant of the format of packed
tensors."""

PLANE = 1 << 11
"""Elements of a packed tensor between the two whose 8-bit codes share a word; a constant of the
format."""

PACKED_TILE = 1 << 15
"""Elements of a packed tensor that share one entry of `starts`; a constant of the format."""

DRAW_STEP = 1 << 16
"""Where in its tensor's noise a piece may begin: at multiples of this, so that no tile of a kernel
crosses an index of 2³²."""


@dataclass(frozen=True)
class Draw:
    """The noise of a piece of a tensor: that of `key`, a number of 32 bits, from element `start`
    on.

    Noise belongs to the element, not to λ: the same λ gives the same bits, whatever came before and
    however the work is cut.

    Raises:
        ValueError: `key` is no such number, or `start` no multiple of DRAW_STEP.
    """

    key: int
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.key < 2**32 or not 0 <= self.start < 2**48 or self.start % DRAW_STEP:
            raise ValueError(
                f"{self}: expected a key of 32 bits, and a start of less than 2⁴⁸ that {DRAW_STEP}"
                " divides"
            )


def fp32(lam: float) -> float:
    """λ rounded to fp32, the only rounding that λ itself sees.

    Raises:
        ValueError: λ is not finite, or is not finite in fp32.
    """
    rounded = ctypes.c_float(lam).value
    if not math.isfinite(rounded):
        raise ValueError(f"λ is {lam!r}: expected a number that is finite in fp32")
    return rounded


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c in fp32 with one rounding, on hardware that may have no such instruction.

    The product of two fp32 is exact in fp64. The fp64 sum is rounded to odd (when inexact, to that
    neighbour whose last bit is 1), and 53 bits are enough for the second rounding to be the only
    one that counts, subnormal results included.

    Args:
        a, b, c: fp32 tensors of shapes that broadcast.

    Source: S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE TC 57(4),
    2008.
    """
    if not a.dtype == b.dtype == c.dtype == torch.float32:
        raise TypeError(f"fma takes three fp32 tensors, got {a.dtype}, {b.dtype}, {c.dtype}")
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # what the sum lost, exactly (Knuth's two-sum)
    other = total - product
    error = (product - (total - other)) + (addend - other)
    even = (total.view(torch.int64) & 1) == 0
    inexact = torch.isfinite(error) & (error != 0)
    towards = torch.copysign(torch.full_like(total, math.inf), error)
    return torch.where(inexact & even, torch.nextafter(total, towards), total).float()


def lerp(
    base: Tensor,
    inst: Tensor,
    lam: float,
    dtype: torch.dtype | None = None,
    intermediate_dtype: torch.dtype | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """W(λ) = round_dtype(lerp32(base, inst, λ)): the contract of every merge and every switch.

    Args:
        base, inst: tensors of one shape; bf16, fp16 or fp32, in any mix.
        lam: any finite λ; rounded to fp32 once.
        dtype: of the result; the instruct side's by default.
        intermediate_dtype: what the result is rounded to first, for a tensor that is held wider
            than its checkpoint says.
        draw: the noise of the elements in row-major order, for a first rounding that is
            `stochastic`.

    Numerics:
        Sources are upcast exactly, all arithmetic is fp32, rounding is nearest-even unless drawn.
        Where both sources have the same bits the result has their value, −0 included. λ = 0 and λ =
        1 give the source: its bits where it has the live dtype (NaN payloads too), else its value
        rounded. Where all dtypes are equal, equal bits survive as they are; in a mix the payload of
        a NaN is not specified.
    """
    dtype = inst.dtype if dtype is None else dtype
    intermediate_dtype = needed_intermediate(intermediate_dtype, dtype)
    lam = fp32(lam)
    u = None if draw is None else noise(draw, base.numel()).view(base.shape).to(base.device)
    if lam in (0.0, 1.0):
        return rounded(inst if lam else base, dtype, intermediate_dtype, u)
    b, i = base.float(), inst.float()
    weight = torch.full((), lam, dtype=torch.float32, device=b.device)
    merged = fma(weight, i - b, b) if abs(lam) < 0.5 else fma(weight - 1, i - b, i)
    merged = rounded(torch.where(same_bits(b, i), b, merged), dtype, intermediate_dtype, u)
    if base.dtype == inst.dtype == dtype and intermediate_dtype is None:
        merged = torch.where(same_bits(base, inst), base, merged)
    return merged


def probe(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield base, inst and λ, a few hundred chosen values at a time, on which other ways to compute
    `lerp` differ from it."""
    exponents = [2.0**k for k in range(-12, 12)]
    near = (1.0, 1.3612505, 1.0000001, -1.9999999, 0.33333334)
    chosen = [x * y for x in exponents for y in near] + [3e-41, -7e-42, 1e-38, 6e-8, 65504.0]
    b = torch.tensor(chosen, dtype=torch.float32, device="cpu").to(dtype)
    i = torch.cat([b[1:] * 1.0625, b[:1] - 0.1]).to(dtype)
    b, i = torch.cat([b, b, b * 1.01]), torch.cat([i, b.flip(0), b * 1.02])
    for lam in (0.0055872, 0.05, 1 / 3, 0.49999997, 0.5, 0.6, 0.999, -0.2, 1.5, 3.7):
        # whole vectors of every width, then what remains
        for length in (b.numel(), 71, 33, 15, 7, 1):
            yield b[:length], i[:length], lam


def sparse_set_(
    live: Tensor,
    positions: Tensor,
    base: Tensor,
    target: Tensor,
    lam: float,
    intermediate_dtype: torch.dtype | None = None,
) -> None:
    """live[positions] = lerp(base, target, λ): the contract of a delta that lives at positions
    only.

    Args:
        live: contiguous; elements that are not listed keep their bits.
        positions: int64 [P], row-major, no two alike.
        base, target: [P], the values at these positions for λ = 0 and λ = 1.
        lam, intermediate_dtype: as for `lerp`.
    """
    live.view(-1)[positions] = lerp(base, target, lam, live.dtype, intermediate_dtype)


def index_positions(where: Tensor, starts: Tensor) -> Tensor:
    """Positions of an index list, int64 [P].

    Args:
        where: uint16 [P], places within tiles of INDEX_TILE elements, tile after tile.
        starts: int64 [tiles + 1], entries before each tile, and P.
    """
    tile = torch.repeat_interleave(
        torch.arange(starts.numel() - 1, device=starts.device), starts.diff()
    )
    return tile * INDEX_TILE + where.long()


def bitmap_positions(where: Tensor) -> Tensor:
    """Positions of a bitmap, int64 [P]: 32·w + j where bit j of word w is set.

    Args:
        where: int32 words.
    """
    bits = (where.long()[:, None] >> torch.arange(32, device=where.device)) & 1
    return bits.view(-1).nonzero().view(-1)


def packed_codes(
    base: Tensor, inst: Tensor, width: int, span: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """The code of every weight, and where there is none: what of a delta has to be known beside
    live weights.

    With k = bits(inst) − bits(base), both weights of one sign, the code is 2·k + p, p being the
    lowest bit of the base's pattern. Coded are finite weights whose patterns are equal,
    and those of one sign, both normal, with |k| up to LIMIT[width]; where `span` leaves [0, 1], of
    the latter only those with base, inst, W(lo) and W(hi) in one binade and no merge under the
    smallest normal number before it is rounded.

    Args:
        base, inst: of one shape and one dtype, bf16 or fp16.
        width: 8 or 16, the bits of a code.
        span: the λ, from lo to hi, that the codes are for; 0 and 1 are among them.

    Returns:
        int16 codes, 0 where there is none; bool, true there.

    Numerics: exact integers. `packed_sources` says why this is enough.
    """
    dtype = base.dtype
    b, i = base.view(torch.int16).int(), inst.view(torch.int16).int()
    k = i - b
    coded = (b ^ i >= 0) & (k.abs() <= LIMIT[width]) & _normal(b, dtype) & _normal(i, dtype)
    if not 0 <= span[0] <= span[1] <= 1:
        binade = b >> MANTISSA[dtype]
        coded &= i >> MANTISSA[dtype] == binade
        for lam in span:
            coded &= lerp(base, inst, lam).view(torch.int16).int() >> MANTISSA[dtype] == binade
            coded &= (
                lerp(base, inst, lam, torch.float32).abs() >= torch.finfo(dtype).smallest_normal
            )
    coded |= (k == 0) & ((b & 0x7FFF) <= largest(dtype))
    return torch.where(coded, 2 * k + (b & 1), 0).to(torch.int16), ~coded


def packed_sources(live: Tensor, codes: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Base and inst of coded weights that hold W(λ): the one pair that the code, λ and the live
    bits leave possible.

    Args:
        live: W(λ), bf16 or fp16.
        codes: int16 in its shape, see `packed_codes`.
        lam: λ that `live` holds; outside [0, 1] the codes must be for that.

    Numerics:
        Let L be the lower and U = L + |k| the upper pattern of a pair, and μ the weight of U: λ
        where k > 0, else 1 − λ. Where k < 0 the base is U, and the parity of L follows from p and
        k. Within [0, 1], f(L) = (1 − μ)·val(L) + μ·val(L + |k|) grows with L,
        and by at least f(L)/256 with each step: a normal number with h bits below its leading one
        is at most 2ʰ⁺¹ units of its last place, and h is 7 or more (of fp16 10; then read 2048). So
        two L of one parity are more than f/128 apart, while all f that round to one W lie within
        one unit of its last place, at most W/128; where W is a power of two they lie within ¾ of
        that, and else f exceeds the power below it by half a unit. The roundings in fp32 move f by
        2⁻²³ of itself and change nothing. Hence at most one L of the given parity rounds to W,
        binade boundaries between L and U or not, and bisection over that parity finds it.

        Outside [0, 1] base, inst and W share a binade [2ᵉ, 2ᵉ⁺¹) by promise, in which f has equal
        steps. W is monotone in λ, so it is enough to ask this of W(lo) and W(hi). A merge that
        rounds up to 2ᵉ⁺¹ breaks it visibly. One that lies under 2ᵉ and rounds up to it does not,
        and need not: the grid under 2ᵉ is twice as fine, so it lies within a quarter of a unit, and
        the steps of the binade take it to 2ᵉ too. But under the smallest normal number the grid is
        as coarse as over it, and a merge rounds up from half a unit: scaled to another exponent, as
        `packed.cpu.Transition` scales, it would not. So there is no code where a merge lies under
        the smallest normal number. A code k = 0 says that base and inst are W.
    """
    dtype, h = live.dtype, MANTISSA[live.dtype]
    w, k = live.view(torch.int16).int() & 0x7FFF, codes.int() >> 1
    n, p = k.abs(), (codes.int() ^ torch.where(k < 0, k, 0)) & 1
    first, last = torch.full_like(w, 1 << h), torch.full_like(w, largest(dtype))
    if not 0 <= fp32(lam) <= 1:
        first, last = w >> h << h, (w >> h << h) + (1 << h) - 1
    # least half x with W(2x + p) ≥ w
    low, high = (first - p + 1) >> 1, (last - n - p) >> 1

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        lower = 2 * x + p
        sides = torch.where(k < 0, lower + n, lower), torch.where(k < 0, lower, lower + n)
        return tuple(side.to(torch.int16).view(dtype) for side in sides)  # type: ignore[return-value]

    while bool((low < high).any()):
        middle = (low + high) >> 1
        reached = lerp(*pair(middle), lam).view(torch.int16).int() >= w
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    sign = live.view(torch.int16) & -0x8000
    b, i = (
        torch.where(k == 0, live.view(torch.int16), side.view(torch.int16) | sign).view(dtype)
        for side in pair(low)
    )
    return b, i


def packed_switch(live: Tensor, codes: Tensor, old: float, new: float) -> Tensor:
    """W(new) of coded weights that hold W(old)."""
    return lerp(*packed_sources(live, codes, old), new)


def _normal(bits: Tensor, dtype: torch.dtype) -> Tensor:
    magnitude = bits & 0x7FFF
    return (magnitude >> MANTISSA[dtype] > 0) & (magnitude <= largest(dtype))


def largest(dtype: torch.dtype) -> int:
    """The pattern of the largest finite number."""
    return 0x7F7F if dtype == torch.bfloat16 else 0x7BFF


def lowrank(
    base: Tensor,
    u: Tensor,
    v: Tensor,
    lam: float,
    dtype: torch.dtype | None = None,
    intermediate_dtype: torch.dtype | None = None,
) -> Tensor:
    """W(λ) = round_dtype(fma(λ, UV, B)): the contract of a delta that is held as a product of two
    thin matrices.

    Args:
        base: B, [M, N] or [E, M, N]; bf16, fp16 or fp32.
        u, v: U [..., M, R] and V [..., R, N], of these dtypes.
        lam, dtype, intermediate_dtype: as for `lerp`; the result has the base's dtype by default.

    Numerics:
        UV is `product`, all else is fp32. Faster ways sum UV in fp32, in an order of their own, so
        they agree with this only up to the error of those sums, which `lowrank.LowRank` bounds. λ =
        0 gives the base: its bits where it has the live dtype, else its value rounded; U and V do
        not count then, whatever they hold. Where UV is 0 the result has the base's value, −0
        included.
    """
    dtype = base.dtype if dtype is None else dtype
    intermediate_dtype = needed_intermediate(intermediate_dtype, dtype)
    lam = fp32(lam)
    if lam == 0.0:
        return rounded(base, dtype, intermediate_dtype)
    b, delta = base.float(), product(u, v)
    merged = fma(torch.full((), lam, dtype=torch.float32, device=b.device), delta, b)
    return rounded(torch.where(delta == 0, b, merged), dtype, intermediate_dtype)


def product(u: Tensor, v: Tensor) -> Tensor:
    """UV in fp32: exact products, summed in fp64 from k = 0 upwards, rounded once."""
    total = torch.zeros(*u.shape[:-1], v.shape[-1], dtype=torch.float64, device=u.device)
    for k in range(u.shape[-1]):
        total += u[..., :, k : k + 1].double() * v[..., k : k + 1, :].double()
    return total.float()


def rounded(
    values: Tensor,
    dtype: torch.dtype,
    intermediate_dtype: torch.dtype | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """A copy of `values` in `dtype`, rounded to `intermediate_dtype` first where given; the first
    of these roundings draws `u` where given."""
    first = intermediate_dtype or dtype
    if u is not None and values.dtype != first:
        values = stochastic(values.float(), u, first)
    if intermediate_dtype is not None:
        values = values.to(intermediate_dtype)
    return values.to(dtype, copy=True)


def needed_intermediate(
    intermediate_dtype: torch.dtype | None, dtype: torch.dtype
) -> torch.dtype | None:
    """The intermediate dtype, or None where rounding to it first changes nothing: where it is fp32,
    or `dtype` itself."""
    return None if intermediate_dtype in (dtype, torch.float32) else intermediate_dtype


def noise(draw: Draw, count: int) -> Tensor:
    """u of `count` elements, 16 bits each in int64: u = mix(lo32(index) ^ mix(hi32(index) ^ key)) &
    0xFFFF."""
    index = torch.arange(draw.start, draw.start + count, device="cpu")
    return mix((index & 0xFFFFFFFF) ^ mix((index >> 32) ^ draw.key)) & 0xFFFF


def stochastic(x: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, away from zero with a probability that is its distance from the neighbour
    nearer to zero, in ulps.

    Args:
        x: fp32.
        u: integers of 16 bits, in the shape of x.

    Numerics:
        With m = |x|, sign kept: bf16: (bits(m) + u) >> 16. fp16: ((bits(m) + (u >> 3)) >> 13) −
        (112 << 10) for m ≥ 2⁻¹⁴, else (⌊m·2⁴⁰⌋ + u) >> 16. What `dtype` represents keeps its value.
        Non-finite x, and m that is not below the largest number of `dtype`, go to nearest; so does
        all for fp32. For one u, monotone in x.
    """
    nearest = x.to(dtype)
    if dtype == torch.float32:
        return nearest
    m = x.abs()
    bits = m.view(torch.int32).long()
    if dtype == torch.bfloat16:
        pattern = (bits + u) >> 16
    else:
        normal = ((bits + (u >> 3)) >> 13) - (112 << 10)
        below = (torch.where(m < 2**-14, m.double() * 2**40, 0.0).floor().long() + u) >> 16
        pattern = torch.where(m < 2**-14, below, normal)
    pattern = torch.where(torch.signbit(x), pattern - 2**15, pattern).to(torch.int16)
    return torch.where(m < torch.finfo(dtype).max, pattern.view(dtype), nearest)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Return a mask of where two tensors of one dtype have the same bit pattern; unlike `==` it
    tells −0 from 0 and finds equal NaNs."""
    return a.contiguous().view(BITS[a.dtype]) == b.contiguous().view(BITS[b.dtype])


def mix(x: Tensor) -> Tensor:
    """lowbias32 of int64 tensors that hold 32-bit values: a bijection on [0, 2³²) with little bias.

    Source: C. Wellons, hash-prospector (github.com/skeeto/hash-prospector), lowbias32.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def odd_low(column: Tensor) -> Tensor:
    """The factor of `odd` that depends on a word's place in its chunk: 33 bits, odd, no two
    alike."""
    return (mix(column) << 1) | 1


def odd_high(chunk: Tensor) -> Tensor:
    """The factor of `odd` that depends on the chunk: 64 bits, odd."""
    return (mix(chunk ^ 0x5BD1E995) << 32) | mix(chunk ^ 0x9E3779B9) | 1


def odd(j: Tensor) -> Tensor:
    """odd(j), the factor of word j, as int64 (mod 2⁶⁴)."""
    return odd_high(j // CHUNK_WORDS) * odd_low(j % CHUNK_WORDS)


def folded(words: Tensor, version: int = CHECKSUM_VERSION) -> Tensor:
    """Return word + FOLD · (word >> 32) mod 2⁶⁴ of int64 words, the shift keeping the sign.

    Numerics:
        Without it a change in the upper bits of a word would count little: a flip of bit 63 changes
        the sum by 2⁶³ · odd(j) ≡ 2⁶³ whatever j is, and two of them cancel. Folded, a flip of bit k
        changes a word by 2ᵏ, or for k ≥ 32 by 2ᵏ⁻³² · (2³² + FOLD), both times an odd number times
        at most 2³¹. So flips of one bit in two words cancel only if the sum or the difference of
        their odd(j) is 0 mod 2³³. In a chunk none is: `odd_low` are 33 bits, no two alike, and none
        the negative of another mod 2³³. Across chunks about one pair of words in 2³² is so.

        The fold is linear: parts of a word that stand in their own bits, the rest zero, have folds
        that add up to the word's. So elements can be summed, or exchanged in a sum, one by one.

        A linear fold cannot tell all words apart. Two are folded alike if their halves differ by
        793665977 and −3281063053, and by no other two numbers (signs may both be changed): see
        `tests/kernels/test_checksum.py`. A change within one half is always seen.
    """
    return words + FOLD[version] * (words >> 32)


def checksum(tensor: Tensor, version: int = CHECKSUM_VERSION) -> int:
    """Σ_j folded(word_j) · odd(j) mod 2⁶⁴ over the tensor's 64-bit little-endian row-major words,
    zero-padded.

    Args:
        tensor: any dtype, any shape; 0 elements give 0.
        version: 2, or 1 to compare with files of earlier versions: that one folds nothing.

    Numerics:
        Exact integer arithmetic. Each factor is odd, so a change inside one half of a word is
        always seen; see `folded` for more than one.
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    padded = torch.zeros(-(-data.numel() // 8) * 8, dtype=torch.uint8, device="cpu")
    padded[: data.numel()] = data
    words = folded(padded.view(torch.int64), version)
    return int((words * odd(torch.arange(words.numel(), device="cpu"))).sum()) % 2**64

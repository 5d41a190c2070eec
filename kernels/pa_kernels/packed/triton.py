"""The packed switch as one Triton launch per group of tensors that share dtype, width of codes and
device.

There is no table and no branch here: in nearly every warp some weight crosses a binade, so both
ways would be walked. The way that solves for the lower pattern holds for all coded weights, and is
what every weight takes. Each merge is made and rounded at its own exponent, so that a pair near the
smallest normal number, which is scaled to no other one, is like any other here.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels.checksum_triton import fold, odd_high, odd_low
from pa_kernels.dense_triton import TRITON_DTYPES, lerp_of, round_to
from pa_kernels.packed.state import PackedRow, State
from pa_kernels.reference import CHUNK_WORDS, PACKED_TILE
from pa_kernels.reference import PLANE as PLANE_ELEMENTS
from pa_kernels.switch import TritonGroup
from pa_kernels.tiles import INTERPRETED, Launch

LAUNCHES = {8: Launch(block=PACKED_TILE, threads=256), 16: Launch(block=PACKED_TILE, threads=256)}
"""By width of codes. `block` is a tile, which a program takes a plane at a time. Not yet timed on a
GPU: chosen from offline compilation, CANDIDATES being what a GPU has to decide between."""

CANDIDATES = tuple(Launch(PACKED_TILE, threads) for threads in (128, 256))

assert PACKED_TILE == 4 * CHUNK_WORDS, "a tile is one chunk of the checksum"

TILE, PLANE = tl.constexpr(PACKED_TILE), tl.constexpr(PLANE_ELEMENTS)


@triton.jit
def solve_near(m, k, p, lam, inside, OUT: tl.constexpr):
    """The lower pattern of what has magnitude m, for |k| below half a binade: at most one power of
    two is near.

    All in units from the nearest power of two, X; those above it count double where values are
    meant. With l = δ − μ|k| the pair lies on one side of X if l ≥ 0 or l + |k| ≤ 0, and l is the
    lower one; else that is 2·μ|k| − v over 1 + μ below X, v being W's distance in the smaller
    units.
    """
    one: tl.constexpr = 128 if tl.bfloat16 == OUT else 1024
    shifted = m + (one >> 1)
    # the float 2²³ + x has x as its last bits
    delta = ((shifted & (one - 1)) | 0x4B000000).to(tl.float32, bitcast=True)
    delta -= 8388608.0 + (one >> 1)
    kf = k.to(tl.float32)
    # μ|k| is the larger of λk and (λ − 1)k
    alone = tl.minimum(tl.fma(kf, -lam, delta), tl.fma(kf, 1.0 - lam, delta))
    slope = tl.where(k > 0, 1.0 / (1.0 + lam), 1.0 / (2.0 - lam))
    across = tl.fma(alone, 2.0, tl.maximum(-delta, 0.0)) * slope
    crosses = (alone < 0) & (alone + tl.abs(kf) > inside)
    return (shifted & -one) + to_parity(tl.where(crosses, across, alone), p)


@triton.jit
def solve_far(m, k, p, lam, inside, OUT: tl.constexpr):
    """The lower pattern of what has magnitude m, for any k: `packed.cpu.solved` in fp32."""
    H: tl.constexpr = 7 if tl.bfloat16 == OUT else 10
    one: tl.constexpr = 1 << H
    n = tl.abs(k)
    upper = tl.where(k > 0, lam, 1.0 - lam)
    lower = tl.where(k > 0, 1.0 - lam, lam)
    grown = upper * (((n >> H) + 127) << 23).to(tl.float32, bitcast=True)
    j = (n & (one - 1)).to(tl.float32)
    significand = ((m & (one - 1)) + one).to(tl.float32)
    both = lower + grown
    # how many powers of two W is above f(X): an exponent field, and back by as much
    shift = (((significand / tl.fma(grown, j, both * one)).to(tl.int32, bitcast=True)) >> 23) - 127
    y = significand * ((127 - shift) << 23).to(tl.float32, bitcast=True)
    # where the upper one is beyond a power of two more than the lower one, its units are twice as
    # large
    crosses = y >= tl.fma(lower, 2.0 * one - j, grown * (2.0 * one))
    units = tl.where(crosses, grown * 2.0, grown)
    origin = tl.fma(units, j, lower * one) + tl.where(crosses, 0.0, grown * one)
    across = (y - origin) / (lower + units) + (shift * one).to(tl.float32)
    alone = tl.fma(n.to(tl.float32), -upper, significand - one)
    return (m & -one) + to_parity(tl.where(inside == 0.0, across, alone), p)


@triton.jit
def to_parity(x, p):
    """The integer of parity p that is nearest to x, whose magnitude is below 2²²: near 1.5 · 2²⁴
    numbers are 2 apart."""
    z = (x - p.to(tl.float32)) + 25165824.0
    return ((z.to(tl.int32, bitcast=True) - 0x4BC00000) << 1) + p


@triton.jit
def value(pattern, OUT: tl.constexpr):
    """fp32 of a magnitude's pattern."""
    if tl.bfloat16 == OUT:
        x = (pattern << 16).to(tl.float32, bitcast=True)
    else:
        x = pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def blended(b, k, lam, OUT: tl.constexpr):
    """The contract between patterns b and b + k, finite and of one sign, before it is rounded."""
    base_near = tl.abs(lam) < 0.5
    base, inst = value(b, OUT), value(b + k, OUT)
    return tl.fma(inst - base, tl.where(base_near, lam, lam - 1.0), tl.where(base_near, base, inst))


@triton.jit
def switched(m, k, p, old, new, inside, OUT: tl.constexpr, WIDTH: tl.constexpr):
    """|W(new)| in fp32, still to be rounded, from the magnitude m of W(old): right wherever there
    is a code."""
    if WIDTH == 8:
        low = solve_near(m, k, p, old, inside, OUT)
    else:
        low = solve_far(m, k, p, old, inside, OUT)
    b = low - tl.minimum(k, 0)
    if WIDTH == 16 and tl.float16 == OUT:
        # fp32 has too few bits to tell neighbours apart for sure: look, and step
        held = round_to(blended(b, k, old, OUT), OUT).to(tl.int16, bitcast=True).to(tl.int32)
        b += tl.where(held < m, 2, tl.where(held > m, -2, 0))
    return blended(b, k, new, OUT)


@triton.jit
def rounded_pair(low, high, OUT: tl.constexpr, ASM: tl.constexpr):
    """Two fp32 that are not negative, rounded, as patterns in one int32. Compilers do not find
    NVIDIA's instruction here."""
    if ASM:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;"
            if tl.bfloat16 == OUT
            else "cvt.rn.f16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low = round_to(low, OUT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = round_to(high, OUT).to(tl.int16, bitcast=True).to(tl.int32) << 16
        pair = low | high
    return pair


@triton.jit
def terms(pairs, factors, COUNT: tl.constexpr):
    """Terms of the checksum [COUNT / 4], from patterns two to an int32 [COUNT / 2]."""
    low, high = tl.split(tl.reshape(pairs, [COUNT // 4, 2]))
    return fold((low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)) * factors


@triton.jit
def in_word(w, offsets):
    """What a 16-bit pattern adds to its folded 64-bit word, by where it stands there."""
    return fold((w.to(tl.int64) & 0xFFFF) << (offsets % 4 * 16).to(tl.int64))


@triton.jit
def full_tile(
    w_ptr,
    code_ptr,
    tile,
    old,
    new,
    inside,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ASM: tl.constexpr,
):
    """Switch a whole tile, a block of two planes at a time; its checksum before and after, less the
    high factor."""
    # hints are kept on what is made here, not on what is handed over; two neighbours are loaded as
    # one int32
    w_ptr = tl.multiple_of(w_ptr.to(tl.pointer_type(tl.int32)), 16) + tile * (TILE // 2)
    code_ptr = tl.multiple_of(code_ptr.to(tl.pointer_type(tl.int32)), 16)
    code_ptr += tile * (TILE * WIDTH // 32)
    pairs = tl.arange(0, PLANE // 2)
    before, after = tl.zeros((PLANE // 4,), tl.int64), tl.zeros((PLANE // 4,), tl.int64)
    for block in tl.range(TILE // (2 * PLANE), num_stages=1):
        if WIDTH == 8:
            codes = tl.load(code_ptr + tl.multiple_of(block * (PLANE // 2), PLANE // 2) + pairs)
        for plane in tl.static_range(2):
            first = tl.multiple_of((block * 2 + plane) * (PLANE // 2), PLANE // 2)
            if WIDTH == 16:
                codes = tl.load(code_ptr + first + pairs)
                low_code, high_code = (codes << 16) >> 16, codes >> 16
            else:
                low_code = (codes << (24 - 8 * plane)) >> 24
                high_code = (codes << (8 - 8 * plane)) >> 24
            w = tl.load(w_ptr + first + pairs)
            # all four before either is switched: 57 registers, else 64 (8-bit bf16 on sm_90)
            k_low, p_low, k_high, p_high = (
                low_code >> 1,
                low_code & 1,
                high_code >> 1,
                high_code & 1,
            )
            low = switched(w & 0x7FFF, k_low, p_low, old, new, inside, OUT, WIDTH)
            high = switched((w >> 16) & 0x7FFF, k_high, p_high, old, new, inside, OUT, WIDTH)
            merged = rounded_pair(low, high, OUT, ASM) | (w & -0x7FFF8000)
            tl.store(w_ptr + first + pairs, merged)
            factors = odd_low(first // 2 + tl.arange(0, PLANE // 4))
            before += terms(w, factors, PLANE)
            after += terms(merged, factors, PLANE)
    return tl.sum(before, 0), tl.sum(after, 0)


@triton.jit
def packed_kernel(
    words,
    sizes,
    outs,
    codes,
    starts,
    wheres,
    bases,
    targets,
    olds,
    lams,
    befores,
    afters,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ASM: tl.constexpr,
    TAIL: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = (word & 0xFFFFFFFF) >> 1
    offset = tile * TILE
    old, new = tl.load(olds + t), tl.load(lams + t)
    # outside [0, 1] every pair shares its binade, and no distance is greater than this
    inside = tl.where((old >= 0) & (old <= 1), 0.0, 1e30)
    out, code_address = tl.load(outs + t), tl.load(codes + t)
    w_ptr = out.to(tl.pointer_type(tl.int16)) + offset
    # a tile is one chunk of the checksum, which has one high factor
    before, after = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    if word & 1:
        before, after = full_tile(out, code_address, tile, old, new, inside, OUT, WIDTH, ASM)
    else:
        code_ptr = code_address.to(tl.pointer_type(tl.int16)) + tile * (TILE * WIDTH // 16)
        end = tl.minimum(tl.load(sizes + t) - offset, TILE).to(tl.int32)
        befores_here, afters_here = tl.zeros((TAIL,), tl.int64), tl.zeros((TAIL,), tl.int64)
        first = 0
        while first < end:
            offsets = first + tl.arange(0, TAIL)
            mask = offsets < end
            if WIDTH == 16:
                code = tl.load(code_ptr + offsets, mask=mask, other=0)
            else:
                places = offsets // (2 * PLANE) * PLANE + offsets % PLANE
                pair = tl.load(code_ptr + places, mask=mask, other=0)
                code = tl.where(offsets // PLANE % 2 == 0, (pair << 8) >> 8, pair >> 8)
            w = tl.load(w_ptr + offsets, mask=mask, other=0)
            m = w.to(tl.int32) & 0x7FFF
            k, p = code.to(tl.int32) >> 1, code.to(tl.int32) & 1
            merged = switched(m, k, p, old, new, inside, OUT, WIDTH)
            merged = round_to(merged, OUT).to(tl.int16, bitcast=True) | (w & -0x8000)
            merged = tl.where(mask, merged, 0)
            tl.store(w_ptr + offsets, merged, mask=mask)
            befores_here += in_word(w, offsets) * odd_low(offsets // 4)
            afters_here += in_word(merged, offsets) * odd_low(offsets // 4)
            first += TAIL
        before, after = tl.sum(befores_here, 0), tl.sum(afters_here, 0)
    # exceptions come last, in the same program: their lines are still in L2, and what was stored
    # and summed there is replaced
    starts_ptr = tl.load(starts + t).to(tl.pointer_type(tl.int32)) + tile
    entry, end = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    if entry < end:
        tl.debug_barrier()
        where_ptr = tl.load(wheres + t).to(tl.pointer_type(tl.uint16))
        base_ptr = tl.load(bases + t).to(tl.pointer_type(OUT))
        target_ptr = tl.load(targets + t).to(tl.pointer_type(OUT))
        change = tl.zeros((TAIL,), tl.int64)
        while entry < end:
            entries = entry + tl.arange(0, TAIL)
            mask = entries < end
            place = tl.load(where_ptr + entries, mask=mask, other=0).to(tl.int32)
            b = tl.load(base_ptr + entries, mask=mask, other=0)
            i = tl.load(target_ptr + entries, mask=mask, other=0)
            held = tl.load(w_ptr + place, mask=mask, other=0)
            merged = lerp_of(b, i, new, OUT, OUT).to(tl.int16, bitcast=True)
            tl.store(w_ptr + place, merged, mask=mask)
            apart = (in_word(merged, place) - in_word(held, place)) * odd_low(place // 4)
            change += tl.where(mask, apart, 0)
            entry += TAIL
        after += tl.sum(change, 0)
    high = odd_high(tile)
    tl.atomic_add(befores + t, before * high, sem="relaxed")
    tl.atomic_add(afters + t, after * high, sem="relaxed")


def constants(dtype: torch.dtype, width: int, launch: Launch, nvidia: bool) -> dict[str, Any]:
    """The constexpr arguments of `packed_kernel`. TAIL is two elements a thread, so that tails do
    not set the register count."""
    return {
        "OUT": TRITON_DTYPES[dtype],
        "WIDTH": width,
        "ASM": nvidia and not INTERPRETED,
        "TAIL": 2 * launch.threads,
    }


class PackedTritonGroup(TritonGroup[PackedRow]):
    """Tensors of one dtype and one width of codes on one device, ready to be switched from the λ in
    `state.olds` to those in `lams`."""

    kernel = packed_kernel

    def __init__(
        self, entries: Sequence[int], rows: Sequence[PackedRow], launch: Launch | None = None
    ):
        super().__init__(entries, rows)
        self.state = State(len(rows), self.device)
        entry = rows[0].entry
        self.launch = launch or LAUNCHES[entry.width]
        nvidia = torch.version.hip is None
        self.constants = constants(entry.dtype, entry.width, self.launch, nvidia)
        self.cut([row.out.numel() for row in rows], PACKED_TILE)

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.state.olds, self.lams, self.state.before, self.state.after

"""The packed switch as one Triton launch per group of tensors that share dtype, width and layout of
codes and device.

There is no table and no branch here: in nearly every warp some weight crosses a binade, so both
ways would be walked. In the layout `size` every weight takes the way that solves for the base,
which holds for all codes. Each merge is made and rounded at its own exponent, so that a pair near
the smallest normal number, which is scaled to no other one, is like any other here.

In the layout `speed` every weight takes the step that holds for pairs within a binade, less than
half as many instructions. The others are listed: they are stepped back and solved for one by one,
while their lines are in L2.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import reference
from pa_kernels.checksum_triton import fold, odd_high, odd_low
from pa_kernels.dense_triton import TRITON_DTYPES, lerp_of, round_pairs, round_to
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
def slopes(lam):
    """What solving for the base takes of λ: −λ/2, 1/(1 + λ), 1/(2 − λ), and 0, or −∞ where every
    pair shares its binade."""
    threshold = tl.where((lam >= 0) & (lam <= 1), 0.0, float("-inf"))
    return lam * -0.5, 1.0 / (1.0 + lam), 1.0 / (2.0 - lam), threshold


@triton.jit
def constants_of(word, OUT: tl.constexpr):
    """Bits of fp32 numbers into which others are put: 2²³ + 128; 128, or of fp16 1024; 192 or 1536.

    NVIDIA's logic instruction takes three operands, and one constant at most, so `x & A | B` is one
    instruction if B is in a register. That needs a B which no compiler knows: no word of the tile
    table is negative.
    """
    zero = (word >> 63).to(tl.int32)
    if tl.bfloat16 == OUT:
        bits = (zero + 0x4B000080, zero + 0x43000000, zero + 0x43400000)
    else:
        bits = (zero + 0x4B000080, zero + 0x44800000, zero + 0x44C00000)
    return bits


@triton.jit
def near_sources(shifted, step, parity, one_bits, slope, OUT: tl.constexpr):
    """Base and instruct of what holds W(λ), for |k| below half a binade: at most one power of two
    is near. fp32, of fp16 times 2⁻¹¹²: its bits shifted, subnormals too.

    In units from the nearest power of two, X, the base is δ − λk if that and the instruct lie on
    one side of X. Else units above X count double: with v = δ + max(δ, 0), W's distance in the
    smaller ones, it is (v − 2λk)/(1 + λ) below X if k > 0, or (v − λk)/(2 − λ) above it.

    Args:
        shifted: the pattern of |W| plus half a binade, shifted by 16 or, of fp16, 13 places; other
            bits than its own may be anything.
        step: bits of the fp32 number 2²³ + 128 + 2k.
        parity: p, shifted by as many.
        one_bits: the second of `constants_of`.
        slope: `slopes` of λ.
    """
    half, rising, falling, threshold = slope
    SHIFT: tl.constexpr = 16 if tl.bfloat16 == OUT else 13
    one: tl.constexpr = 1 << (23 - SHIFT)
    exponent: tl.constexpr = -0x800000 if tl.bfloat16 == OUT else 0x0F800000
    delta = ((shifted & ((one - 1) << SHIFT)) | one_bits).to(tl.float32, bitcast=True)
    delta -= one + one // 2
    k2 = step.to(tl.float32, bitcast=True) - 8388736.0
    alone = tl.fma(k2, half, delta)
    other = tl.fma(k2, 0.5, alone)
    v = alone + tl.maximum(delta, 0.0)
    across = tl.where(k2 > 0, tl.fma(k2, half, v) * rising, v * falling)
    x = tl.where(alone * other < threshold, across, alone)
    # 0.0 or 1.0
    p = (parity * (0x3F800000 >> SHIFT)).to(tl.float32, bitcast=True)
    # the nearest number of the parity p: near 1.5 · 2²⁴ numbers are 2 apart
    even = ((x - p) + 25165824.0).to(tl.int32, bitcast=True)
    b = (even << (SHIFT + 1)) + ((shifted & exponent) | parity)
    i = (step << (SHIFT - 1)) + b - (64 << SHIFT)
    return b.to(tl.float32, bitcast=True), i.to(tl.float32, bitcast=True)


@triton.jit
def far_sources(m, code, lam, slope, OUT: tl.constexpr):
    """Base and instruct of what has magnitude m, for any k: `packed.cpu.solved` in fp32, and a step
    of fp16. Otherwise as `near_sources`."""
    H: tl.constexpr = 7 if tl.bfloat16 == OUT else 10
    one: tl.constexpr = 1 << H
    inside = slope[3] == 0.0
    k = code >> 1
    below = tl.minimum(k, 0)  # the lower one less the base
    n = k - 2 * below
    upper = tl.where(k > 0, lam, 1.0 - lam)
    lower = tl.where(k > 0, 1.0 - lam, lam)
    grown = upper * (((n >> H) + 127) << 23).to(tl.float32, bitcast=True)
    j = small(n & (one - 1))
    significand = small(m & (one - 1)) + one
    both = lower + grown
    # how many powers of two W is above f(X), in an exponent's place: the difference of two floats'
    # bits is that of their exponents, less one where the second has the larger significand
    least = tl.fma(grown, j, both * one).to(tl.int32, bitcast=True)
    w = significand.to(tl.int32, bitcast=True)
    shift = (w - least) & tl.where(inside, -0x800000, 0)
    y = (w - shift).to(tl.float32, bitcast=True)
    # where the upper one is beyond a power of two more than the lower one, its units are twice as
    # large
    crosses = y >= tl.fma(lower, 2.0 * one - j, grown * (2.0 * one))
    units = tl.where(crosses, grown * 2.0, grown)
    origin = tl.fma(units, j, lower * one) + tl.where(crosses, 0.0, grown * one)
    across = (y - origin) / (lower + units)
    alone = tl.fma(n.to(tl.float32), -upper, significand - one)
    x = tl.where(inside, across, alone)
    p = (code ^ below) & 1
    even = (x - (p * 0x3F800000).to(tl.float32, bitcast=True)) + 25165824.0
    even = (even.to(tl.int32, bitcast=True) - 0x4BC00000) << 1
    b = ((m & -one) - below) + (shift >> (23 - H)) + (even + p)
    if tl.float16 == OUT:
        # fp32 has too few bits to tell neighbours apart for sure: look, and step
        held = round_to(either_way(value(b, OUT), value(b + k, OUT), lam, False), OUT)
        held = held.to(tl.int16, bitcast=True).to(tl.int32)
        b += tl.where(held < m, 2, tl.where(held > m, -2, 0))
    return value(b, OUT), value(b + k, OUT)


@triton.jit
def small(n):
    """fp32 of an integer that is at least 0 and below 2²³: the float 2²³ + n has n as its last
    bits."""
    return (n | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def value(pattern, OUT: tl.constexpr):
    """fp32 of a magnitude's pattern."""
    if tl.bfloat16 == OUT:
        x = (pattern << 16).to(tl.float32, bitcast=True)
    else:
        x = pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def merged(b, i, weight, NEAR: tl.constexpr, SCALED: tl.constexpr):
    """The contract between two of one sign, before it is rounded; `weight` is λ if it is NEAR the
    base, else λ − 1.

    Both SCALED by 2⁻¹¹², as `near_sources` has fp16: down there fp32 has as many places below a
    number of fp16 as at its own scale, so the merge is scaled, too.
    """
    x = tl.fma(i - b, weight, b if NEAR else i)
    return x * 5192296858534827628530496329220096.0 if SCALED else x


@triton.jit
def either_way(b, i, lam, SCALED: tl.constexpr):
    """`merged`, for a λ that may be near either."""
    if tl.abs(lam) < 0.5:
        x = merged(b, i, lam, True, SCALED)
    else:
        x = merged(b, i, lam - 1.0, False, SCALED)
    return x


@triton.jit
def step_of(codes, j: tl.constexpr, step_bits):
    """Bits of the fp32 number 2²³ + 128 + 2k, of the code in byte j of four."""
    return ((codes >> (8 * j)) & 0xFE) ^ step_bits


@triton.jit
def bit_of(codes, j: tl.constexpr, SHIFT: tl.constexpr):
    """The code in byte j of four, its parity bit in place SHIFT, and all other bits of the word."""
    return codes >> (8 * j - SHIFT) if 8 * j > SHIFT else codes << (SHIFT - 8 * j)


@triton.jit
def near_weight(
    shifted,
    codes,
    j: tl.constexpr,
    weight,
    slope,
    bits,
    NEAR: tl.constexpr,
    OUT: tl.constexpr,
):
    """|W(new)| in fp32, still to be rounded, by the code in byte j of four."""
    SHIFT: tl.constexpr = 16 if tl.bfloat16 == OUT else 13
    step, parity = step_of(codes, j, bits[0]), bit_of(codes, j, SHIFT) & (1 << SHIFT)
    b, i = near_sources(shifted, step, parity, bits[1], slope, OUT)
    return merged(b, i, weight, NEAR, tl.float16 == OUT)


@triton.jit
def switched(m, code, old, new, slope, bits, OUT: tl.constexpr, WIDTH: tl.constexpr):
    """|W(new)| in fp32, still to be rounded, from the magnitude m of W(old) and its code."""
    if WIDTH == 8:
        SHIFT: tl.constexpr = 16 if tl.bfloat16 == OUT else 13
        shifted = (m + (1 << (22 - SHIFT))) << SHIFT
        step, parity = step_of(code, 0, bits[0]), (code & 1) << SHIFT
        b, i = near_sources(shifted, step, parity, bits[1], slope, OUT)
    else:
        b, i = far_sources(m, code, old, slope, OUT)
    return either_way(b, i, new, WIDTH == 8 and tl.float16 == OUT)


@triton.jit
def rounded_offset(k2, near, weight):
    """bits(W(λ)) less the base's, and a constant, of a pair within a binade: as `packed.cpu.table`,
    by two sums whose last places are those of the contract and of the dtype.

    Args:
        k2: 2k.
        near: stands for the base, in the middle of a binade of so many units (192 + p,
            or of fp16 1536 + p), or for the instruct, k above it.
        weight: λ/2 where that is the base, else (λ − 1)/2.
    """
    # near 1.5 · 2²³ numbers are 1 apart
    return (tl.fma(k2, weight, near) + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def half_weight(lam):
    """Whether λ is near the base, and its `weight` for `rounded_offset`."""
    near = tl.abs(lam) < 0.5
    return near, tl.where(near, lam, lam - 1.0) * 0.5


@triton.jit
def stand_ins(codes, j: tl.constexpr, bits, OUT: tl.constexpr):
    """2k, and what stands for base and instruct in `rounded_offset`, of the code in byte j of
    four."""
    SHIFT: tl.constexpr = 16 if tl.bfloat16 == OUT else 13
    k2 = step_of(codes, j, bits[0]).to(tl.float32, bitcast=True) - 8388736.0
    b = ((bit_of(codes, j, SHIFT) & (1 << SHIFT)) | bits[2]).to(tl.float32, bitcast=True)
    return k2, b, tl.fma(k2, 0.5, b)


@triton.jit
def stepped_weight(
    codes,
    j: tl.constexpr,
    weights,
    bits,
    OLD_NEAR: tl.constexpr,
    NEW_NEAR: tl.constexpr,
    OUT: tl.constexpr,
):
    """bits(W(new)) − bits(W(old)) of a pair within a binade, by the code in byte j of four."""
    k2, b, i = stand_ins(codes, j, bits, OUT)
    old_offset = rounded_offset(k2, b if OLD_NEAR else i, weights[0])
    return rounded_offset(k2, b if NEW_NEAR else i, weights[1]) - old_offset


@triton.jit
def stepped_tile(
    w_ptr,
    code_ptr,
    tile,
    hashes,
    weights,
    bits,
    OLD_NEAR: tl.constexpr,
    NEW_NEAR: tl.constexpr,
    OUT: tl.constexpr,
):
    """Step every weight of a whole tile as if its pair lay within a binade; otherwise as
    `full_tile`. Those of other pairs can be stepped back: none steps below 0 or past the sign."""
    w_ptr = tl.multiple_of(w_ptr.to(tl.pointer_type(tl.int32)), 16) + tile * (TILE // 2)
    code_ptr = tl.multiple_of(code_ptr.to(tl.pointer_type(tl.int32)), 16) + tile * (TILE // 4)
    hash_ptr = tl.multiple_of(hashes.to(tl.pointer_type(tl.int32)), 16)
    pairs = tl.arange(0, PLANE // 2)
    before, after = tl.zeros((PLANE // 4,), tl.int64), tl.zeros((PLANE // 4,), tl.int64)
    for block in tl.range(TILE // (2 * PLANE), num_stages=1):
        codes = tl.load(code_ptr + tl.multiple_of(block * (PLANE // 2), PLANE // 2) + pairs)
        for plane in tl.static_range(2):
            first = tl.multiple_of((block * 2 + plane) * (PLANE // 2), PLANE // 2)
            w = tl.load(w_ptr + first + pairs)
            low = stepped_weight(codes, plane, weights, bits, OLD_NEAR, NEW_NEAR, OUT)
            high = stepped_weight(codes, plane + 2, weights, bits, OLD_NEAR, NEW_NEAR, OUT)
            result = w + low + high * 65536
            tl.store(w_ptr + first + pairs, result)
            first_word = tl.multiple_of(first // 2, PLANE // 4)
            hashed = tl.load(hash_ptr + first_word + tl.arange(0, PLANE // 4))
            factors = ((hashed.to(tl.uint32).to(tl.uint64) << 1) | 1).to(tl.int64)
            before += terms(w, factors, PLANE)
            after += terms(result, factors, PLANE)
    return tl.sum(before, 0), tl.sum(after, 0)


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
    hashes,
    old,
    weight,
    slope,
    bits,
    NEAR: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ASM: tl.constexpr,
):
    """Switch a whole tile, a block of two planes at a time; its checksum before and after, less the
    high factor."""
    SHIFT: tl.constexpr = 16 if tl.bfloat16 == OUT else 13
    # hints are kept on what is made here, not on what is handed over; two neighbours are loaded as
    # one int32
    w_ptr = tl.multiple_of(w_ptr.to(tl.pointer_type(tl.int32)), 16) + tile * (TILE // 2)
    code_ptr = tl.multiple_of(code_ptr.to(tl.pointer_type(tl.int32)), 16)
    code_ptr += tile * (TILE * WIDTH // 32)
    hash_ptr = tl.multiple_of(hashes.to(tl.pointer_type(tl.int32)), 16)
    pairs = tl.arange(0, PLANE // 2)
    before, after = tl.zeros((PLANE // 4,), tl.int64), tl.zeros((PLANE // 4,), tl.int64)
    for block in tl.range(TILE // (2 * PLANE), num_stages=1):
        if WIDTH == 8:
            codes = tl.load(code_ptr + tl.multiple_of(block * (PLANE // 2), PLANE // 2) + pairs)
        for plane in tl.static_range(2):
            first = tl.multiple_of((block * 2 + plane) * (PLANE // 2), PLANE // 2)
            w = tl.load(w_ptr + first + pairs)
            if WIDTH == 8:
                # half a binade is added to both at once
                shifted = (w & 0x7FFF7FFF) + (0x10001 << (22 - SHIFT))
                first_at, second_at = shifted << SHIFT, shifted >> (16 - SHIFT)
                low = near_weight(first_at, codes, plane, weight, slope, bits, NEAR, OUT)
                high = near_weight(second_at, codes, plane + 2, weight, slope, bits, NEAR, OUT)
            else:
                codes = tl.load(code_ptr + first + pairs)
                b, i = far_sources(w & 0x7FFF, (codes << 16) >> 16, old, slope, OUT)
                low = merged(b, i, weight, NEAR, False)
                b, i = far_sources((w >> 16) & 0x7FFF, codes >> 16, old, slope, OUT)
                high = merged(b, i, weight, NEAR, False)
            result = round_pairs(low, high, OUT, ASM) | (w & -0x7FFF8000)
            tl.store(w_ptr + first + pairs, result)
            first_word = tl.multiple_of(first // 2, PLANE // 4)
            hashed = tl.load(hash_ptr + first_word + tl.arange(0, PLANE // 4))
            factors = ((hashed.to(tl.uint32).to(tl.uint64) << 1) | 1).to(tl.int64)
            before += terms(w, factors, PLANE)
            after += terms(result, factors, PLANE)
    return tl.sum(before, 0), tl.sum(after, 0)


@triton.jit
def crossing_weights(
    w_ptr,
    code_address,
    starts_ptr,
    places_address,
    tile,
    old,
    new,
    slope,
    bits,
    OUT: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Step the listed weights of a tile back, and solve for their bases; what it adds to the
    checksum after `stepped_tile`, less the high factor."""
    old_near, old_weight = half_weight(old)
    new_near, new_weight = half_weight(new)
    code_ptr = code_address.to(tl.pointer_type(tl.int8)) + tile * TILE
    places = places_address.to(tl.pointer_type(tl.uint16))
    change = tl.zeros((TAIL,), tl.int64)
    entry, end = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    if entry < end:
        tl.debug_barrier()  # for what other threads have stored
        while entry < end:
            entries = entry + tl.arange(0, TAIL)
            mask = entries < end
            position = tl.load(places + entries, mask=mask, other=0).to(tl.int32)
            held = tl.load(w_ptr + position, mask=mask, other=0)
            byte = (position // (2 * PLANE) * PLANE + position % PLANE) * 2 + position // PLANE % 2
            code = tl.load(code_ptr + byte, mask=mask, other=0).to(tl.int32)
            k2, b, i = stand_ins(code, 0, bits, OUT)
            step = rounded_offset(k2, tl.where(new_near, b, i), new_weight)
            step -= rounded_offset(k2, tl.where(old_near, b, i), old_weight)
            w = held.to(tl.int32) - step
            x = switched(w & 0x7FFF, code, old, new, slope, bits, OUT, 8)
            result = round_to(x, OUT).to(tl.int16, bitcast=True) | (held & -0x8000)
            tl.store(w_ptr + position, result, mask=mask)
            apart = (in_word(result, position) - in_word(held, position)) * odd_low(position // 4)
            change += tl.where(mask, apart, 0)
            entry += TAIL
    return tl.sum(change, 0)


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
    cross_starts,
    crosses,
    olds,
    lams,
    befores,
    afters,
    hashes,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    ASM: tl.constexpr,
    TAIL: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = (word & 0xFFFFFFFF) >> 1
    offset = tile * TILE
    old, new = tl.load(olds + t), tl.load(lams + t)
    slope, bits = slopes(old), constants_of(word, OUT)
    out, code_address = tl.load(outs + t), tl.load(codes + t)
    w_ptr = out.to(tl.pointer_type(tl.int16)) + offset
    # a tile is one chunk of the checksum, which has one high factor
    before, after = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    if word & 1:
        if STEPS:
            old_near, old_weight = half_weight(old)
            new_near, new_weight = half_weight(new)
            weights = old_weight, new_weight
            if old_near:
                if new_near:
                    before, after = stepped_tile(
                        out, code_address, tile, hashes, weights, bits, True, True, OUT
                    )
                else:
                    before, after = stepped_tile(
                        out, code_address, tile, hashes, weights, bits, True, False, OUT
                    )
            else:
                if new_near:
                    before, after = stepped_tile(
                        out, code_address, tile, hashes, weights, bits, False, True, OUT
                    )
                else:
                    before, after = stepped_tile(
                        out, code_address, tile, hashes, weights, bits, False, False, OUT
                    )
            starts_ptr = tl.load(cross_starts + t).to(tl.pointer_type(tl.int32))
            places_address = tl.load(crosses + t)
            after += crossing_weights(
                w_ptr,
                code_address,
                starts_ptr,
                places_address,
                tile,
                old,
                new,
                slope,
                bits,
                OUT,
                TAIL,
            )
        elif tl.abs(new) < 0.5:
            before, after = full_tile(
                out, code_address, tile, hashes, old, new, slope, bits, True, OUT, WIDTH, ASM
            )
        else:
            before, after = full_tile(
                out, code_address, tile, hashes, old, new - 1.0, slope, bits, False, OUT, WIDTH, ASM
            )
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
            x = switched(m, code.to(tl.int32), old, new, slope, bits, OUT, WIDTH)
            result = round_to(x, OUT).to(tl.int16, bitcast=True) | (w & -0x8000)
            result = tl.where(mask, result, 0)
            tl.store(w_ptr + offsets, result, mask=mask)
            befores_here += in_word(w, offsets) * odd_low(offsets // 4)
            afters_here += in_word(result, offsets) * odd_low(offsets // 4)
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
            position = tl.load(where_ptr + entries, mask=mask, other=0).to(tl.int32)
            b = tl.load(base_ptr + entries, mask=mask, other=0)
            i = tl.load(target_ptr + entries, mask=mask, other=0)
            held = tl.load(w_ptr + position, mask=mask, other=0)
            result = lerp_of(b, i, new, OUT, OUT).to(tl.int16, bitcast=True)
            tl.store(w_ptr + position, result, mask=mask)
            apart = (in_word(result, position) - in_word(held, position)) * odd_low(position // 4)
            change += tl.where(mask, apart, 0)
            entry += TAIL
        after += tl.sum(change, 0)
    high = odd_high(tile)
    tl.atomic_add(befores + t, before * high, sem="relaxed")
    tl.atomic_add(afters + t, after * high, sem="relaxed")


def constants(
    dtype: torch.dtype, width: int, layout: str, launch: Launch, nvidia: bool
) -> dict[str, Any]:
    """The constexpr arguments of `packed_kernel`. TAIL is two elements a thread, so that tails do
    not set the register count."""
    return {
        "OUT": TRITON_DTYPES[dtype],
        "WIDTH": width,
        "STEPS": layout == "speed",
        "ASM": nvidia and not INTERPRETED,
        "TAIL": 2 * launch.threads,
    }


class PackedTritonGroup(TritonGroup[PackedRow]):
    """Tensors of one dtype, width and layout of codes on one device, ready to be switched from the
    λ in `state.olds` to those in `lams`."""

    kernel = packed_kernel

    def __init__(
        self, entries: Sequence[int], rows: Sequence[PackedRow], launch: Launch | None = None
    ):
        super().__init__(entries, rows)
        self.state, self.hashes = State(len(rows), self.device), _hashes(self.device)
        entry = rows[0].entry
        self.launch = launch or LAUNCHES[entry.width]
        nvidia = torch.version.hip is None
        self.constants = constants(entry.dtype, entry.width, entry.layout, self.launch, nvidia)
        self.cut([row.out.numel() for row in rows], PACKED_TILE)

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        state = self.state
        return state.olds, self.lams, state.before, state.after, self.hashes


@functools.cache
def _hashes(device: torch.device) -> Tensor:
    """`reference.mix` of every place in a chunk, two of 32 bits to an int64: what `odd_low` is made
    of. The kernel would take 2.5 instructions a weight to hash, and takes 1 to look it up (sm_90);
    the 32 KB stay in L1."""
    mixed = reference.mix(torch.arange(CHUNK_WORDS, device="cpu"))
    return (mixed[::2] | mixed[1::2] << 32).to(device)

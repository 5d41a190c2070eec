"""The loops of `compiled`, as numba compiles them; imported there, and nowhere else."""

# mypy: ignore-errors
# (arguments of compiled functions have no Python types)

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pa_kernels.reference import CHECKSUM_VERSION, CHUNK_WORDS
from pa_kernels.reference import FOLD as FOLDS

i16, i32, f32 = ir.IntType(16), ir.IntType(32), ir.FloatType()

# numba's own integers are 64 bits wide in every operation, which would quarter the speed


@intrinsic
def widened(_, pattern):
    def code(context, builder, signature, arguments):
        word = builder.zext(arguments[0], i32)
        return builder.bitcast(builder.shl(word, i32(16)), f32)

    return types.float32(types.int16), code


@intrinsic
def rounded(_, x):
    """To nearest, ties to even; NaN stays NaN."""

    def code(context, builder, signature, arguments):
        word = builder.bitcast(arguments[0], i32)
        high = builder.lshr(word, i32(16))
        bias = builder.add(builder.and_(high, i32(1)), i32(0x7FFF))
        nearest = builder.lshr(builder.add(word, bias), i32(16))
        magnitude = builder.and_(word, i32(0x7FFFFFFF))
        is_nan = builder.icmp_unsigned(">", magnitude, i32(0x7F800000))
        return builder.trunc(builder.select(is_nan, builder.or_(high, i32(0x40)), nearest), i16)

    return types.int16(types.float32), code


@intrinsic
def fma(_, a, b, c):
    def code(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


def jit(function: Any) -> Any:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder in which to keep what is compiled
        return numba.njit(**options)(function)


BLOCK = 1024
"""Places by which products are summed; it divides the chunk."""

STEP = 256
"""Elements between two loops over them. In steps of a block the sums come in spells in which memory
waits, and a pass takes a tenth longer."""

GROUP = 16 * BLOCK
"""Elements whose products are summed in BLOCK places before the sums are: what is added up."""

CHUNK = CHUNK_WORDS
FOLD = FOLDS[CHECKSUM_VERSION]


@jit
def checksum(words, low, high, fold):
    total = np.int64(0)
    for c in range(high.size):
        part = np.int64(0)
        for j in range(CHUNK):
            word = words[c * CHUNK + j]
            part += (word + fold * (word >> 32)) * low[j]
        total += part * high[c]
    return total


@jit
def tree(terms):
    half = BLOCK // 2
    while half >= 16:
        for k in range(half):
            terms[k] += terms[k + half]
        half //= 2
    total = 0.0
    for k in range(16):
        total += terms[k]
    return total


@jit
def merge_block(w, b, i, terms, weight, base_near):
    for k in range(w.size):
        base, inst = widened(b[k]), widened(i[k])
        delta = inst - base
        merged = rounded(fma(weight, delta, base if base_near else inst))
        merged = b[k] if b[k] == i[k] else merged
        w[k] = merged
        terms[k] += (widened(merged) - base) * delta


@jit
def sum_block(words, low):
    total = np.int64(0)
    for j in range(words.size):
        total += (words[j] + FOLD * (words[j] >> 32)) * low[j]
    return total


@jit
def lerp_(w, b, i, weight, base_near, low, high):
    terms = np.zeros(BLOCK, np.float32)
    words = w[: w.size // 4 * 4].view(np.int64)
    total, moved = np.int64(0), 0.0
    for start in range(0, w.size, STEP):
        stop = min(start + STEP, w.size)
        places = terms[start % BLOCK :]
        merge_block(w[start:stop], b[start:stop], i[start:stop], places, weight, base_near)
        if stop % GROUP == 0 or stop == w.size:
            moved += tree(terms)
            terms[:] = 0
        first = start // 4 % CHUNK
        part = sum_block(words[start // 4 : stop // 4], low[first : first + STEP // 4])
        if stop % 4:
            word = np.int64(0)
            for k in range(stop // 4 * 4, stop):
                word |= (np.int64(w[k]) & 0xFFFF) << (k % 4 * 16)
            part += (word + FOLD * (word >> 32)) * low[stop // 4 % CHUNK]
        total += part * high[start // 4 // CHUNK]
    return total, moved


@jit
def multiply_block(w, b, i, terms):
    for k in range(w.size):
        base = widened(b[k])
        terms[k] += (widened(w[k]) - base) * (widened(i[k]) - base)


@jit
def products(w, b, i, before):
    terms = np.zeros(BLOCK, np.float32)
    moved = before
    for start in range(0, w.size, BLOCK):
        stop = min(start + BLOCK, w.size)
        multiply_block(w[start:stop], b[start:stop], i[start:stop], terms)
        if stop % GROUP == 0 or stop == w.size:
            moved += tree(terms)
            terms[:] = 0
    return moved

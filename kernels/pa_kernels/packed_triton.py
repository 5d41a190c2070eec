"""The packed switch as one Triton launch per group of tensors that share dtype, width of codes and
device.

There is no table and no branch here: in nearly every warp some weight crosses a binade, so both
ways would be walked. The way that solves for the lower pattern holds for all coded weights, and is
what every lane does. Each merge is made and rounded at its own exponent, so that a pair near the
smallest normal number, which is scaled to no other one, is like any other here.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import tiles
from pa_kernels.checksum_triton import odd_high, odd_low
from pa_kernels.lerp_triton import OPTIONS, TRITON_DTYPES, lerp_of, round_to
from pa_kernels.reference import CHUNK_WORDS, MANTISSA, PACKED_TILE, PLANE
from pa_kernels.tiles import INTERPRETED, Launch

if TYPE_CHECKING:
    from pa_kernels.packed import Row

LAUNCHES = {8: Launch(block=PACKED_TILE, threads=256), 16: Launch(block=PACKED_TILE, threads=256)}
"""By width of codes. `block` is a tile, which a program takes a plane at a time. Not yet timed on a
GPU: chosen from offline compilation, CANDIDATES being what a GPU has to decide between."""

CANDIDATES = tuple(Launch(PACKED_TILE, threads) for threads in (128, 256))


@triton.jit
def solve_near(m, k, p, lam, inside, H: tl.constexpr):
    """The lower pattern of what has magnitude m, for |k| below half a binade: at most one power of
    two is near.

    All in units from the nearest power of two, X; those above it count double where values are
    meant. With l = δ − μ|k| the pair lies on one side of X if l ≥ 0 or l + |k| ≤ 0, and l is the
    lower one; else that is 2·μ|k| − v over 1 + μ below X, v being W's distance in the smaller
    units.
    """
    one: tl.constexpr = 1 << H
    at = m + (one >> 1)
    # the float 2²³ + x has x as its last bits
    delta = ((at & (one - 1)) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (one >> 1))
    kf = k.to(tl.float32)
    # μ|k| is the larger of λk and (λ − 1)k
    alone = tl.minimum(tl.fma(kf, -lam, delta), tl.fma(kf, 1.0 - lam, delta))
    across = tl.fma(alone, 2.0, tl.maximum(-delta, 0.0)) * tl.where(
        k > 0, 1.0 / (1.0 + lam), 1.0 / (2.0 - lam)
    )
    crosses = (alone < 0) & (alone + tl.abs(kf) > inside)
    return (at & -one) + to_parity(tl.where(crosses, across, alone), p)


@triton.jit
def solve_far(m, k, p, lam, inside, H: tl.constexpr):
    """The lower pattern of what has magnitude m, for any k: `pa_kernels.packed_pairs.solved` in
    fp32."""
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
    found = (y - origin) / (lower + units) + (shift * one).to(tl.float32)
    alone = tl.fma(n.to(tl.float32), -upper, significand - one)
    return (m & -one) + to_parity(tl.where(inside == 0.0, found, alone), p)


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
def switched(
    m,
    k,
    p,
    old,
    new,
    inside,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
    VERIFY: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """|W(new)| in fp32, still to be rounded, from the magnitude m of W(old): right wherever there
    is a code."""
    low = solve_near(m, k, p, old, inside, H) if WIDTH == 8 else solve_far(m, k, p, old, inside, H)
    b = low - tl.minimum(k, 0)
    if VERIFY:
        # fp32 has too few bits to tell neighbours apart for sure: look, and step
        found = (
            round_to(blended(b, k, old, OUT), OUT, INTERPRET)
            .to(tl.int16, bitcast=True)
            .to(tl.int32)
        )
        b += tl.where(found < m, 2, tl.where(found > m, -2, 0))
    return blended(b, k, new, OUT)


@triton.jit
def switched_pairs(
    w,
    k_low,
    p_low,
    k_high,
    p_high,
    old,
    new,
    inside,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
    VERIFY: tl.constexpr,
    ASM: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Patterns two to an int32 of W(new) from those of W(old)."""
    low = switched(w & 0x7FFF, k_low, p_low, old, new, inside, OUT, WIDTH, H, VERIFY, INTERPRET)
    high = switched(
        (w >> 16) & 0x7FFF, k_high, p_high, old, new, inside, OUT, WIDTH, H, VERIFY, INTERPRET
    )
    return rounded_pair(low, high, OUT, ASM, INTERPRET) | (w & -0x7FFF8000)


@triton.jit
def rounded_pair(low, high, OUT: tl.constexpr, ASM: tl.constexpr, INTERPRET: tl.constexpr):
    """Two fp32 that are not negative, rounded, as patterns in one int32. Compilers do not find
    NVIDIA's instruction here."""
    if ASM and tl.bfloat16 == OUT:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif ASM:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low, high = round_to(low, OUT, INTERPRET), round_to(high, OUT, INTERPRET)
        pair = (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (
            high.to(tl.int16, bitcast=True).to(tl.int32) << 16
        )
    return pair


@triton.jit
def terms(pairs, factors, LANES: tl.constexpr):
    """Terms of the checksum [LANES / 4], from patterns two to an int32 [LANES / 2]."""
    low, high = tl.split(tl.reshape(pairs, [LANES // 4, 2]))
    return ((low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)) * factors


@triton.jit
def in_word(w, lanes):
    """A 16-bit pattern where it stands in its 64-bit word."""
    return (w.to(tl.int64) & 0xFFFF) << (lanes % 4 * 16).to(tl.int64)


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
    H: tl.constexpr,
    VERIFY: tl.constexpr,
    ASM: tl.constexpr,
    TILE: tl.constexpr,
    PLANE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Switch a whole tile, a block of two planes at a time; its checksum before and after, less the
    high factor."""
    # hints are kept on what is made here, not on what is handed over; two neighbours are loaded as
    # one int32
    w_ptr = tl.multiple_of(w_ptr.to(tl.pointer_type(tl.int32)), 16) + tile * (TILE // 2)
    code_ptr = tl.multiple_of(code_ptr.to(tl.pointer_type(tl.int32)), 16) + tile * (
        TILE * WIDTH // 32
    )
    lanes = tl.arange(0, PLANE // 2)
    before, after = tl.zeros((PLANE // 4,), tl.int64), tl.zeros((PLANE // 4,), tl.int64)
    for block in tl.range(TILE // (2 * PLANE), num_stages=1):
        if WIDTH == 8:
            codes = tl.load(code_ptr + tl.multiple_of(block * (PLANE // 2), PLANE // 2) + lanes)
        for plane in tl.static_range(2):
            at = tl.multiple_of((block * 2 + plane) * (PLANE // 2), PLANE // 2)
            if WIDTH == 16:
                codes = tl.load(code_ptr + at + lanes)
                low, high = (codes << 16) >> 16, codes >> 16
            else:
                low, high = (codes << (24 - 8 * plane)) >> 24, (codes << (8 - 8 * plane)) >> 24
            w = tl.load(w_ptr + at + lanes)
            made = switched_pairs(
                w,
                low >> 1,
                low & 1,
                high >> 1,
                high & 1,
                old,
                new,
                inside,
                OUT,
                WIDTH,
                H,
                VERIFY,
                ASM,
                INTERPRET,
            )
            tl.store(w_ptr + at + lanes, made)
            factors = odd_low(at // 2 + tl.arange(0, PLANE // 4))
            before += terms(w, factors, PLANE)
            after += terms(made, factors, PLANE)
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
    found,
    left,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
    VERIFY: tl.constexpr,
    ASM: tl.constexpr,
    TILE: tl.constexpr,
    PLANE: tl.constexpr,
    TAIL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    tile = (word & 0xFFFFFFFF) >> 1
    offset = tile * TILE
    old, new = tl.load(olds + t), tl.load(lams + t)
    # outside [0, 1] every pair shares its binade, and no distance is greater than this
    inside = tl.where((old >= 0) & (old <= 1), 0.0, 1e30)
    out, code_at = tl.load(outs + t), tl.load(codes + t)
    w_ptr = out.to(tl.pointer_type(tl.int16)) + offset
    # a tile is one chunk of the checksum, which has one high factor
    found_here, left_here = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    if word & 1:
        found_here, left_here = full_tile(
            out, code_at, tile, old, new, inside, OUT, WIDTH, H, VERIFY, ASM, TILE, PLANE, INTERPRET
        )
    else:
        code_ptr = code_at.to(tl.pointer_type(tl.int16)) + tile * (TILE * WIDTH // 16)
        end = tl.minimum(tl.load(sizes + t) - offset, TILE).to(tl.int32)
        before, after = tl.zeros((TAIL,), tl.int64), tl.zeros((TAIL,), tl.int64)
        at = 0
        while at < end:
            lanes = at + tl.arange(0, TAIL)
            inner = lanes < end
            if WIDTH == 16:
                code = tl.load(code_ptr + lanes, mask=inner, other=0)
            else:
                pair = tl.load(
                    code_ptr + lanes // (2 * PLANE) * PLANE + lanes % PLANE, mask=inner, other=0
                )
                code = tl.where(lanes // PLANE % 2 == 0, (pair << 8) >> 8, pair >> 8)
            w = tl.load(w_ptr + lanes, mask=inner, other=0)
            m, k, p = w.to(tl.int32) & 0x7FFF, code.to(tl.int32) >> 1, code.to(tl.int32) & 1
            made = switched(m, k, p, old, new, inside, OUT, WIDTH, H, VERIFY, INTERPRET)
            made = round_to(made, OUT, INTERPRET).to(tl.int16, bitcast=True) | (w & -0x8000)
            made = tl.where(inner, made, 0)
            tl.store(w_ptr + lanes, made, mask=inner)
            before += in_word(w, lanes) * odd_low(lanes // 4)
            after += in_word(made, lanes) * odd_low(lanes // 4)
            at += TAIL
        found_here, left_here = tl.sum(before, 0), tl.sum(after, 0)
    # exceptions come last, in the same program: their lines are still in L2, and what was stored
    # and summed there is replaced
    starts_ptr = tl.load(starts + t).to(tl.pointer_type(tl.int32)) + tile
    at, end = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    if at < end:
        tl.debug_barrier()
        where_ptr = tl.load(wheres + t).to(tl.pointer_type(tl.uint16))
        base_ptr, target_ptr = (
            tl.load(bases + t).to(tl.pointer_type(OUT)),
            tl.load(targets + t).to(tl.pointer_type(OUT)),
        )
        change = tl.zeros((TAIL,), tl.int64)
        while at < end:
            entries = at + tl.arange(0, TAIL)
            inner = entries < end
            place = tl.load(where_ptr + entries, mask=inner, other=0).to(tl.int32)
            b = tl.load(base_ptr + entries, mask=inner, other=0)
            i = tl.load(target_ptr + entries, mask=inner, other=0)
            held = tl.load(w_ptr + place, mask=inner, other=0)
            made = lerp_of(b, i, new, OUT, OUT, OUT, OUT, INTERPRET).to(tl.int16, bitcast=True)
            tl.store(w_ptr + place, made, mask=inner)
            apart = (in_word(made, place) - in_word(held, place)) * odd_low(place // 4)
            change += tl.where(inner, apart, 0)
            at += TAIL
        left_here += tl.sum(change, 0)
    high = odd_high(tile)
    tl.atomic_add(found + t, found_here * high, sem="relaxed")
    tl.atomic_add(left + t, left_here * high, sem="relaxed")


def constants(dtype: torch.dtype, width: int, launch: Launch, nvidia: bool) -> dict[str, Any]:
    """The constexpr arguments of `packed_kernel`. TAIL is two elements a thread, so that tails do
    not set the register count."""
    assert launch.block == PACKED_TILE == 4 * CHUNK_WORDS
    return {
        "OUT": TRITON_DTYPES[dtype],
        "WIDTH": width,
        "H": MANTISSA[dtype],
        "VERIFY": width == 16 and dtype == torch.float16,
        "ASM": nvidia and not INTERPRETED,
        "TILE": launch.block,
        "PLANE": PLANE,
        "TAIL": 2 * launch.threads,
        "INTERPRET": INTERPRETED,
    }


class Group:
    """Tensors of one dtype and one width of codes on one device, ready to be switched; see
    `pa_kernels.packed.PackedGroup`."""

    def __init__(self, entries: Sequence[int], rows: Sequence[Row], launch: Launch | None = None):
        self.entries = tuple(entries)
        self.rows = tuple(rows)
        self.tensors: Sequence[Tensor] = [row.out for row in rows]
        self.device = rows[0].out.device
        self.lams, self.olds = (
            torch.zeros(len(rows), dtype=torch.float32, device=self.device) for _ in range(2)
        )
        self.sums, self.found, self.left = (
            torch.zeros(len(rows), dtype=torch.int64, device=self.device) for _ in range(3)
        )
        self.wrong = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        held = [row.entry for row in rows]
        self.relaunch(launch or LAUNCHES[held[0].width])
        operands = (
            self.tensors,
            *(
                [getattr(e, part) for e in held]
                for part in ("codes", "starts", "where", "base", "target")
            ),
        )
        self.tiles = tiles.build(operands, [row.out.numel() for row in rows], PACKED_TILE)

    def relaunch(self, launch: Launch) -> None:
        """Cut the work so from now on."""
        self.launch = launch
        self.constants = constants(
            self.rows[0].entry.dtype, self.rows[0].entry.width, launch, torch.version.hip is None
        )

    def launch_(self) -> None:
        """Switch from the λ in `olds` to those in `lams`. Touches device memory only, so a CUDA
        graph can record it."""
        if self.tiles.count == 0:
            return
        self.found.zero_()
        self.left.zero_()
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            packed_kernel[(self.tiles.count,)](
                self.tiles.words,
                self.tiles.sizes,
                *self.tiles.pointers,
                self.olds,
                self.lams,
                self.found,
                self.left,
                **self.constants,
                num_warps=self.launch.num_warps(),
                **OPTIONS,
            )
        self.wrong |= self.found != self.sums
        self.sums.copy_(self.left)
        self.olds.copy_(self.lams)

"""The dense lerp as one Triton launch per group of tensors that share dtypes, rounding and
device."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton functions have no Python types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pa_kernels import tiles
from pa_kernels.checksum_triton import fold, mix, odd_high, odd_low
from pa_kernels.reference import CHUNK_WORDS, DRAW_STEP
from pa_kernels.switch import SwitchRow, TritonGroup, Written
from pa_kernels.tiles import INTERPRETED, OPTIONS, Launch

NARROW = Launch(block=2048, threads=128)
WIDE = Launch(block=2048, threads=256)
"""Launches where every tensor has one 16-bit dtype, and for all else: 64 bytes of loads in flight
per thread, 40 registers or fewer. Not yet timed on a GPU: chosen from offline compilation; the
bench sweeps CANDIDATES."""

RECORDED_NARROW = Launch(block=4096, threads=128)
RECORDED_WIDE = Launch(block=2048, threads=128)
"""The same where what is written is summed. The sums of a tile cost about 250 instructions a warp,
so that 32 weights a thread take 21.1 a weight where 16 take 29.1 (sm_90, bf16; 95 and 51
registers)."""

TOTALS_BLOCK = 1024
"""Tiles that a program adds up at a time."""

CANDIDATES = tuple(
    Launch(each * threads, threads) for threads in (64, 128, 256, 512) for each in (8, 16, 32)
)
"""8, 16 and 32 weights a thread: 32, 64 and 128 bytes of loads in flight, 30, 40 and 72–91
registers (sm_90; 64 take 168)."""

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

INTERPRET = tl.constexpr(INTERPRETED)
CHUNK = tl.constexpr(CHUNK_WORDS)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, nearest-even. The interpreter's own cast to bf16 truncates, so there it goes
    through integers."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        u = x.to(tl.uint32, bitcast=True)
        nan = (u & 0x7FFFFFFF) > 0x7F800000
        y = tl.where(nan, 0x7FC0, (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
        y = y.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def widen(x):
    """Exactly to fp32. The interpreter's own cast loses the subnormals of bf16, so there it goes
    through integers too."""
    if INTERPRET and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_twice(x, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr):
    """fp32 to INTERMEDIATE, and that to OUT."""
    if INTERMEDIATE != OUT:
        x = widen(round_to(x, INTERMEDIATE))
    return round_to(x, OUT)


@triton.jit
def noise(draw, offset, COUNT: tl.constexpr):
    """`reference.noise` of COUNT elements from `offset` on, among which no index crosses 2³²;
    `draw` as in `DenseTritonGroup`."""
    first = ((draw >> 32) << 16) + offset
    salt = mix((first >> 32).to(tl.uint32) ^ draw.to(tl.uint32))
    return mix((first.to(tl.uint32) + tl.arange(0, COUNT).to(tl.uint32)) ^ salt) & 0xFFFF


@triton.jit
def stochastic(x, u, DTYPE: tl.constexpr):
    """`reference.stochastic`, through integers alone."""
    word = x.to(tl.uint32, bitcast=True)
    m = word & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        y = (word + u) >> 16  # the sign is the top bit, and no carry reaches it
        below_largest = m < 0x7F7F0000
    else:
        tiny = m < 0x38800000  # 2⁻¹⁴
        scaled = tl.where(tiny, tl.abs(x) * 1099511627776.0, 0.0).to(tl.int32).to(tl.uint32)
        normal = ((m + (u >> 3)) >> 13) - (112 << 10)
        y = tl.where(tiny, (scaled + u) >> 16, normal) | ((word >> 16) & 0x8000)
        below_largest = m < 0x477FE000  # 65504
    return tl.where(below_largest, y.to(tl.uint16).to(DTYPE, bitcast=True), round_to(x, DTYPE))


@triton.jit
def rounded(
    x, draw, offset, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr, IS_STOCHASTIC: tl.constexpr
):
    """fp32 of the elements from `offset` on as they are stored."""
    if IS_STOCHASTIC:
        y = stochastic(x, noise(draw, offset, x.shape[0]), INTERMEDIATE)
        if INTERMEDIATE != OUT:
            y = round_to(widen(y), OUT)
    else:
        y = round_twice(x, OUT, INTERMEDIATE)
    return y


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True) if x.dtype == tl.float32 else x.to(tl.int16, bitcast=True)


@triton.jit
def roles(lam):
    """Both branches of the contract in one form: the weight, and which source is `near` and which
    is `far`."""
    # `near` is the source that λ is closer to, and (1 − λ)(b − i) is (λ − 1)(i − b) exactly; + 0.0
    # turns a λ of −0 into 0
    base_near = tl.abs(lam) < 0.5
    scale = tl.where(base_near, lam, 1.0 - lam) + 0.0
    # at an endpoint both are the same source, so that its bits pass through whatever the other
    # holds
    return scale, base_near, base_near == (scale == 0)


@triton.jit
def unrounded(b, i, lam):
    """lerp32 of any sources at all, element by element."""
    scale, base_near, base_far = roles(lam)
    near = tl.where(base_near, widen(b), widen(i))
    far = tl.where(base_far, widen(b), widen(i))
    return tl.where(bits(near) == bits(far), near, tl.fma(far - near, scale, near))


@triton.jit
def keep_bits(w, b, i, lam, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr):
    """`w`, or the bits of a source where the contract says that they survive."""
    if INTERMEDIATE == OUT:
        if b.dtype == OUT and i.dtype == OUT:
            w = tl.where(bits(b) == bits(i), b, w)
        if b.dtype == OUT:
            w = tl.where(lam == 0.0, b, w)
        if i.dtype == OUT:
            w = tl.where(lam == 1.0, i, w)
    return w


@triton.jit
def lerp_of(b, i, lam, OUT: tl.constexpr, INTERMEDIATE: tl.constexpr):
    """The contract for any sources at all, element by element, rounded to nearest."""
    w = round_twice(unrounded(b, i, lam), OUT, INTERMEDIATE)
    return keep_bits(w, b, i, lam, OUT, INTERMEDIATE)


@triton.jit
def round_pairs(low, high, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """fp32 to DTYPE of 16 bits, nearest-even, two to an int32, as NVIDIA's GPUs round them."""
    if ASM:
        pairs = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;"
            if tl.bfloat16 == DTYPE
            else "cvt.rn.f16x2.f32 $0, $1, $2;",
            "=r,f,f",
            [high, low],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        pairs = (bits(round_to(low, DTYPE)).to(tl.int32) & 0xFFFF) | (
            bits(round_to(high, DTYPE)).to(tl.int32) << 16
        )
    return pairs


@triton.jit
def widen_pairs(pairs, DTYPE: tl.constexpr):
    """fp32 of both values of each int32."""
    if tl.bfloat16 == DTYPE:
        low, high = (
            (pairs << 16).to(tl.float32, bitcast=True),
            (pairs & -65536).to(tl.float32, bitcast=True),
        )
    else:
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def halves_of(x):
    """Every second value of x, and the others."""
    return tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))


@triton.jit
def words_of(halves):
    """64-bit words of int32, two to a word."""
    low, high = halves_of(halves)
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def in_word(w, offsets):
    """What values add to their folded words, by where they stand in their tensor."""
    if w.dtype == tl.float32:
        return fold((bits(w).to(tl.int64) & 0xFFFFFFFF) << (offsets % 2 * 32))
    else:
        return fold((bits(w).to(tl.int64) & 0xFFFF) << (offsets % 4 * 16))


@triton.jit
def stored(
    x,
    near,
    delta,
    w_ptr,
    draw,
    offset,
    first,
    OUT: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store x, rounded to w; the terms of its checksum less their high factor, and Σ (w − near) ·
    delta and Σ delta²."""
    COUNT: tl.constexpr = x.shape[0]
    WORDS: tl.constexpr = COUNT * OUT.primitive_bitwidth // 64
    if OUT.primitive_bitwidth == 16 and INTERMEDIATE == OUT and not IS_STOCHASTIC:
        # two at a time from here on: rounded alone, each would be taken apart and joined again
        x_low, x_high = halves_of(x)
        halves = round_pairs(x_low, x_high, OUT, ASM)
        pair_ptr = tl.multiple_of(w_ptr.to(tl.pointer_type(tl.int32)), 16)
        pair_ptr += tl.multiple_of(offset // 2, COUNT // 2)
        tl.store(pair_ptr + tl.arange(0, COUNT // 2), halves)
        low, high = widen_pairs(halves, OUT)
        near_low, near_high = halves_of(near)
        delta_low, delta_high = halves_of(delta)
        moved = tl.sum(tl.fma(high - near_high, delta_high, (low - near_low) * delta_low), 0)
        distance = tl.sum(tl.fma(delta_high, delta_high, delta_low * delta_low), 0)
    else:
        w = rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC)
        tl.store(tl.multiple_of(w_ptr + offset, 16) + tl.arange(0, COUNT), w)
        if OUT.primitive_bitwidth == 16:
            low, high = halves_of(bits(w).to(tl.int32))
            halves = (low & 0xFFFF) | (high << 16)
        else:
            halves = bits(w)
        moved = tl.sum((widen(w) - near) * delta, 0)
        distance = tl.sum(delta * delta, 0)
    total = tl.sum(fold(words_of(halves)) * odd_low(first + tl.arange(0, WORDS)), 0)
    return total, moved, distance


@triton.jit
def recorded_tile(
    w_ptr,
    b_ptr,
    i_ptr,
    lam,
    draw,
    offset,
    first,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a whole, aligned and finite tile; the terms of its checksum, less their high factor,
    ⟨W − B, D − B⟩ and ‖D − B‖²."""
    scale, base_near, _ = roles(lam)
    offsets = tl.arange(0, BLOCK)
    if BASE == INST:
        near_ptr = tl.multiple_of(tl.where(base_near, b_ptr, i_ptr) + offset, 16)
        far_ptr = tl.multiple_of(tl.where(base_near, i_ptr, b_ptr) + offset, 16)
        near, far = widen(tl.load(near_ptr + offsets)), widen(tl.load(far_ptr + offsets))
    else:
        b = widen(tl.load(tl.multiple_of(b_ptr + offset, 16) + offsets))
        i = widen(tl.load(tl.multiple_of(i_ptr + offset, 16) + offsets))
        near, far = tl.where(base_near, b, i), tl.where(base_near, i, b)
    # two equal forms as in `dense_kernel`; both sources are needed at an endpoint too, which
    # therefore takes its bits from the near one
    if scale < 0:
        delta = far - near
        x = tl.fma(delta, scale, near)
        total, moved, distance = stored(
            x, near, delta, w_ptr, draw, offset, first, OUT, INTERMEDIATE, IS_STOCHASTIC, ASM
        )
    else:
        delta = near - far
        x = tl.where(scale == 0, near, tl.fma(delta, scale * -1.0, near))
        total, moved, distance = stored(
            x, near, delta, w_ptr, draw, offset, first, OUT, INTERMEDIATE, IS_STOCHASTIC, ASM
        )
    # delta is D − B or its negative; W − B is W − near, or that plus D − B
    moved = tl.where(base_near == (scale < 0), moved, 0.0 - moved)
    return total, tl.where(base_near, moved, moved + distance), distance


@triton.jit
def totals_kernel(firsts, sums, moveds, distances, checksums, products, BLOCK: tl.constexpr):
    """Add up the tiles of a tensor, in fp64 and in an order of their own: `products` are ⟨W − B,
    D − B⟩ of all tensors, then ‖D − B‖² of all."""
    t = tl.program_id(0)
    first, end = tl.load(firsts + t), tl.load(firsts + t + 1)
    total = tl.zeros((BLOCK,), tl.int64)
    moved, distance = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    while first < end:
        tiles_here = first + tl.arange(0, BLOCK)
        mask = tiles_here < end
        total += tl.load(sums + tiles_here, mask=mask, other=0)
        moved += tl.load(moveds + tiles_here, mask=mask, other=0.0).to(tl.float64)
        distance += tl.load(distances + tiles_here, mask=mask, other=0.0).to(tl.float64)
        first += BLOCK
    tl.store(checksums + t, tl.sum(total, 0))
    tl.store(products + t, tl.sum(moved, 0))
    tl.store(products + tl.num_programs(0) + t, tl.sum(distance, 0))


@triton.jit
def dense_kernel(
    words,
    sizes,
    outs,
    bases,
    insts,
    lams,
    draws,
    sums,
    moveds,
    distances,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    INST: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    RECORDS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    word = tl.load(words + tl.program_id(0))
    t = word >> 32
    offset = ((word & 0xFFFFFFFF) >> 1) * BLOCK
    # of what is written, where it is recorded; a tile lies within one chunk of the checksum
    total, moved, distance = tl.zeros((), tl.int64), 0.0, 0.0
    first = offset * OUT.primitive_bitwidth // 64
    lam = tl.load(lams + t)
    draw = tl.load(draws + t) if IS_STOCHASTIC else 0
    w_ptr = tl.load(outs + t).to(tl.pointer_type(OUT))
    b_ptr = tl.load(bases + t).to(tl.pointer_type(BASE))
    i_ptr = tl.load(insts + t).to(tl.pointer_type(INST))
    if RECORDS and word & 1:
        total, moved, distance = recorded_tile(
            w_ptr,
            b_ptr,
            i_ptr,
            lam,
            draw,
            offset,
            first % CHUNK,
            OUT,
            BASE,
            INST,
            INTERMEDIATE,
            IS_STOCHASTIC,
            ASM,
            BLOCK,
        )
    elif word & 1:
        # whole, aligned and finite
        scale, base_near, base_far = roles(lam)
        offsets = tl.arange(0, BLOCK)
        if BASE == INST:
            near_ptr = tl.multiple_of(tl.where(base_near, b_ptr, i_ptr) + offset, 16)
            far_ptr = tl.multiple_of(tl.where(base_far, b_ptr, i_ptr) + offset, 16)
            near, far = widen(tl.load(near_ptr + offsets)), widen(tl.load(far_ptr + offsets))
        else:
            b = widen(tl.load(tl.multiple_of(b_ptr + offset, 16) + offsets))
            i = widen(tl.load(tl.multiple_of(i_ptr + offset, 16) + offsets))
            near, far = tl.where(base_near, b, i), tl.where(base_far, b, i)
        # of two equal forms the one whose weight is never positive: then a difference of +0 adds
        # −0, which changes nothing, and where both sources are −0 so is the result
        out_ptr = tl.multiple_of(w_ptr + offset, 16) + offsets
        if scale < 0:
            x = tl.fma(far - near, scale, near)
            tl.store(out_ptr, rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC))
        else:
            x = tl.fma(near - far, scale * -1.0, near)
            tl.store(out_ptr, rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC))
    else:
        PER_WORD: tl.constexpr = 64 // OUT.primitive_bitwidth
        end = tl.minimum(tl.load(sizes + t), offset + BLOCK)
        totals = tl.zeros((TAIL,), tl.int64)
        moveds_here, distances_here = tl.zeros((TAIL,), tl.float32), tl.zeros((TAIL,), tl.float32)
        while offset < end:
            offsets = offset + tl.arange(0, TAIL)
            mask = offsets < end
            b = tl.load(b_ptr + offsets, mask=mask, other=0.0)
            i = tl.load(i_ptr + offsets, mask=mask, other=0.0)
            x = unrounded(b, i, lam)
            w = rounded(x, draw, offset, OUT, INTERMEDIATE, IS_STOCHASTIC)
            w = keep_bits(w, b, i, lam, OUT, INTERMEDIATE)
            tl.store(w_ptr + offsets, w, mask=mask)
            if RECORDS:
                term = in_word(w, offsets) * odd_low(offsets // PER_WORD % CHUNK)
                totals += tl.where(mask, term, 0)
                delta = widen(i) - widen(b)
                moveds_here += tl.where(mask, (widen(w) - widen(b)) * delta, 0.0)
                distances_here += delta * delta
            offset += TAIL
        if RECORDS:
            total = tl.sum(totals, 0)
            moved, distance = tl.sum(moveds_here, 0), tl.sum(distances_here, 0)
    if RECORDS:
        tl.store(sums + tl.program_id(0), total * odd_high(first // CHUNK))
        tl.store(moveds + tl.program_id(0), moved)
        tl.store(distances + tl.program_id(0), distance)


def launch_for(dtypes: Sequence[torch.dtype], records: bool = False) -> Launch:
    """The launch for operands of these dtypes."""
    if len(set(dtypes)) == 1 and dtypes[0].itemsize == 2:
        return RECORDED_NARROW if records else NARROW
    return RECORDED_WIDE if records else WIDE


def dtype_constants(
    names: Sequence[str], dtypes: Sequence[torch.dtype], intermediate_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Constexpr arguments `names` of these dtypes, the live tensor's first, and INTERMEDIATE."""
    constants = {name: TRITON_DTYPES[dtype] for name, dtype in zip(names, dtypes)}
    return constants | {"INTERMEDIATE": TRITON_DTYPES[intermediate_dtype or dtypes[0]]}


def constants(
    dtypes: Sequence[torch.dtype],
    intermediate_dtype: torch.dtype | None,
    is_stochastic: bool,
    records: bool,
    launch: Launch,
    nvidia: bool = torch.version.hip is None,
) -> dict[str, Any]:
    """The constexpr arguments of `dense_kernel`. TAIL is two elements a thread, so that tails do
    not set the register count."""
    return {
        **dtype_constants(("OUT", "BASE", "INST"), dtypes, intermediate_dtype),
        "IS_STOCHASTIC": is_stochastic,
        "RECORDS": records,
        "ASM": nvidia and not INTERPRETED,
        "BLOCK": launch.block,
        "TAIL": 2 * launch.threads,
    }


class DenseTritonGroup(TritonGroup[SwitchRow]):
    """Tensors of one (out, base, inst, intermediate) dtype tuple and one kind of rounding on one
    device, ready to be launched for any λ.

    Attributes:
        draws: int64 [T] on the device, start / DRAW_STEP << 32 | key of each tensor's noise; None
            where rounding is to nearest.
        sums, moved, distances: int64, fp32 and fp32 [tiles] on the device, what each tile of the
            last launch adds to `Written`; None where nothing is recorded.
    """

    kernel = dense_kernel

    def __init__(
        self,
        entries: Sequence[int],
        rows: Sequence[SwitchRow],
        launch: Launch | None = None,
        records: bool = False,
    ):
        super().__init__(entries, rows)
        first, is_stochastic = rows[0], rows[0].draw is not None
        self.launch = launch or launch_for(first.dtypes, records)
        self.constants = constants(
            first.dtypes, first.intermediate_dtype, is_stochastic, records, self.launch
        )
        self.draws: Tensor | None = None
        if is_stochastic:
            words = [row.draw.start // DRAW_STEP << 32 | row.draw.key for row in rows if row.draw]
            self.draws = tiles.table(words, self.device)
        totals = [
            source.sum(dtype=torch.float32).to(self.device)
            for row in rows
            for source in row.operands[1:]
        ]
        finite = torch.stack(totals).isfinite().view(-1, 2).all(dim=1).tolist()
        self.cut([row.out.numel() for row in rows], self.launch.block, finite)
        self.sums: Tensor | None = None
        self.moved: Tensor | None = None
        self.distances: Tensor | None = None
        if records:
            self.sums = torch.zeros(self.tiles.count, dtype=torch.int64, device=self.device)
            self.moved, self.distances = (
                torch.zeros(self.tiles.count, dtype=torch.float32, device=self.device)
                for _ in range(2)
            )
            limits = torch.arange(len(rows) + 1, device=self.device)
            self._firsts = torch.searchsorted(self.tiles.words >> 32, limits)

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.lams, self.draws, self.sums, self.moved, self.distances

    def written(self) -> list[Written]:
        """What the last launch wrote to each tensor; waits for the device."""
        count = len(self.rows)
        checksums = torch.empty(count, dtype=torch.int64, device=self.device)
        products = torch.empty(2 * count, dtype=torch.float64, device=self.device)
        Launch(TOTALS_BLOCK, 128).start(
            totals_kernel,
            count,
            self.device,
            *(self._firsts, self.sums, self.moved, self.distances, checksums, products),
            BLOCK=TOTALS_BLOCK,
            **OPTIONS,
        )
        moved, distances = products.view(2, count).tolist()
        return [
            Written(checksum % 2**64, pair)
            for checksum, pair in zip(checksums.tolist(), zip(moved, distances))
        ]

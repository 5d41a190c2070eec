"""The dense lerp: live tensors rewritten in place for any λ, with the bits of `reference.lerp` on
every device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pa_kernels import compiled, noise, reference
from pa_kernels.checksum import CHUNK_BYTES, high_factors, low_factors, piece_checksum
from pa_kernels.cores import inference, over_cores, pieces
from pa_kernels.projection import projection
from pa_kernels.reference import BITS, Draw
from pa_kernels.switch import (
    Switch,
    SwitchGroup,
    SwitchRow,
    Written,
    check_place,
    check_tensor,
    checked_intermediate,
    columns,
    refuse_flushed_denormals,
)

CHUNK = 1 << 17
"""Elements per step of the CPU paths that touch a tensor more than once: its pieces stay in a
core's L2."""

STREAM = 1 << 24
"""Elements per step of the paths that touch it once: as fast as one flat torch.lerp over 0.44 G
bf16 weights on 2 quiet cores (98 % at 4 M). On busy cores torch's own split of every tensor over
its threads falls to 46 %, these pieces do not."""


RECORDED = 1 << 22
"""Elements per step of compiled loops that sum what they write. With 512 k the calls cost 12 % of a
switch."""

SUMMED = 1 << 19
"""Elements of such a step that torch writes before it sums them: of the live tensor they stay in a
core's L2."""


class Lerp(Switch[Any]):
    """T live tensors with their sources, prepared once so that each λ costs one pass and nothing
    else.

    Args:
        out: live tensors, rewritten in place; contiguous bf16, fp16 or fp32.
        base, inst: the sources, same shapes, in any mix of these dtypes; on the live tensors'
            devices, for one on a GPU also in pinned host memory. They must not change afterwards,
            and no live tensor may overlap a source; neither is checked here.
        intermediate_dtypes: for each tensor the dtype that its result is rounded to before its own,
            or None.
        draws: for each tensor the noise of its first rounding, which is stochastic then, or None.
        records: whether every switch sums what it writes, see `written`.

    Numerics:
        Bit for bit `reference.lerp`, whatever λ came before.

    Cost:
        A switch reads both sources and writes the live tensors: 6 bytes per bf16 weight; recorded,
        16 more per tile on a GPU. On a CPU preparing reads nothing, and the first switch between
        the endpoints goes in smaller steps; on a GPU preparing reads both sources once.

    Raises:
        ValueError, TypeError: naming entry t, what it is and what was expected.
    """

    def __init__(
        self,
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        inst: Sequence[Tensor],
        intermediate_dtypes: Sequence[torch.dtype | None] | None = None,
        draws: Sequence[Draw | None] | None = None,
        *,
        records: bool = False,
    ):
        self.records = records
        lists = {
            "live tensors": out,
            "base": base,
            "instruct": inst,
            "intermediate dtypes": intermediate_dtypes,
            "draws": draws,
        }
        super().__init__([_checked(t, *column) for t, column in enumerate(columns(lists))])

    def _group(self, on_cpu: bool) -> Any:
        if on_cpu:
            return RecordedCpuGroup if self.records else DenseCpuGroup
        from pa_kernels import dense_triton

        return functools.partial(dense_triton.DenseTritonGroup, records=self.records)

    def written(self) -> list[Written]:
        """Return what the last switch wrote to each tensor. Waits for the devices, once each.

        Raises:
            ValueError: nothing is recorded.
        """
        if not self.records:
            raise ValueError("this Lerp records nothing: make it with records=True")
        by_entry: dict[int, Written] = {}
        for group in self.groups:
            by_entry.update(zip(group.entries, group.written()))
        return [by_entry[t] for t in range(self.count)]


def lerp_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    inst: Sequence[Tensor],
    lam: float | Sequence[float],
    *,
    intermediate_dtypes: Sequence[torch.dtype | None] | None = None,
    draws: Sequence[Draw | None] | None = None,
) -> None:
    """Write W(λ) = lerp(base, inst, λ) into `out`, once; see `Lerp` for the arguments, and for many
    λ."""
    Lerp(out, base, inst, intermediate_dtypes, draws).run_(lam)


def _checked(
    t: int, w: Tensor, b: Tensor, i: Tensor, intermediate: torch.dtype | None, draw: Draw | None
) -> SwitchRow:
    for side, tensor in (("live", w), ("base", b), ("instruct", i)):
        check_tensor(t, side, tensor)
        if tensor.shape != w.shape:
            raise ValueError(
                f"entry {t}: {side} has shape {tuple(tensor.shape)}, the live tensor"
                f" {tuple(w.shape)}"
            )
        check_place(t, side, tensor, w, may_be_pinned=True)
    intermediate = checked_intermediate(t, intermediate, w)
    # fp32 is never rounded stochastically
    draw = None if (intermediate or w.dtype) == torch.float32 else draw
    return SwitchRow(tuple(tensor.detach().view(-1) for tensor in (w, b, i)), intermediate, draw)


class DenseCpuGroup(SwitchGroup[SwitchRow]):
    """All CPU tensors of a `Lerp`.

    Attributes:
        patches: by tensor, the pieces in which equal sources need more than torch.lerp. They are
            looked for by the first λ that asks it for that tensor, while a piece is in cache:
            looking for them apart would read the base once more.
    """

    def __init__(self, entries: Sequence[int], rows: Sequence[SwitchRow]):
        super().__init__(entries, rows)
        self.patches: dict[int, list[slice]] = {}

    def launch_(self) -> None:
        refuse_flushed_denormals()
        lams = self.lams.tolist()
        single = [_is_single_pass(row, lam) for row, lam in zip(self.rows, lams)]
        lerped = {t for t, lam in enumerate(lams) if single[t] and lam not in (0.0, 1.0)}
        new = lerped - self.patches.keys()

        def write(work: tuple[int, slice]) -> bool:
            t, piece = work
            w, b, i = (tensor[piece] for tensor in self.rows[t].operands)
            with inference():
                if t in lerped:
                    torch.lerp(b, i, lams[t], out=w)
                    if t not in new or not _needs_patch(b, i):
                        return False
                    _keep_equal_bits_(w, b, i)
                    return True
                draw = self.rows[t].draw
                draw = draw and Draw(draw.key, draw.start + piece.start)
                lerp_piece_(w, b, i, lams[t], self.rows[t].intermediate_dtype, draw)
                return False

        steps = [STREAM if one and t not in new else CHUNK for t, one in enumerate(single)]
        sizes = [row.out.numel() for row in self.rows]
        work = [(t, piece) for t, size in enumerate(sizes) for piece in pieces(size, steps[t])]
        # largest first: what remains for the end is small, and the cores finish together
        work.sort(key=lambda one: one[1].start - one[1].stop)
        patched = [one for one, is_patched in zip(work, over_cores(write, work)) if is_patched]
        for t in lerped - new:
            for piece in self.patches[t]:
                _keep_equal_bits_(*(tensor[piece] for tensor in self.rows[t].operands))
        self.patches.update((t, [piece for k, piece in patched if k == t]) for t in new)


class RecordedCpuGroup(SwitchGroup[SwitchRow]):
    """All CPU tensors of a `Lerp` that records: each piece is summed while it is in cache, by
    compiled loops in the same pass over memory."""

    def __init__(self, entries: Sequence[int], rows: Sequence[SwitchRow]):
        super().__init__(entries, rows)
        self._distances: dict[int, float] = {}
        self._written: list[Written] = []
        compiled.prepare(sum(row.out.nbytes for row in rows))

    def written(self) -> list[Written]:
        return self._written

    def launch_(self) -> None:
        refuse_flushed_denormals()
        lams = self.lams.tolist()
        self._written = []

        def write(work: tuple[int, slice]) -> tuple[int, float, float]:
            t, piece = work
            b, i = (tensor[piece] for tensor in self.rows[t].operands[1:])
            with inference():
                total, moved = _write_recorded_(self.rows[t], piece, lams[t])
                return total, moved, 0.0 if t in self._distances else projection(i, b, i)

        sizes = [row.out.numel() for row in self.rows]
        work = [(t, piece) for t, size in enumerate(sizes) for piece in pieces(size, RECORDED)]
        sums = [[0, 0.0, 0.0] for _ in self.rows]
        for (t, _), parts in zip(work, over_cores(write, work)):
            sums[t] = [total + part for total, part in zip(sums[t], parts)]
        for t, (_, _, distance) in enumerate(sums):
            self._distances.setdefault(t, distance)
            if _is_copy(self.rows[t], lams[t]):
                sums[t][1] = self._distances[t] if lams[t] else 0.0
        self._written = [
            Written(int(total) % 2**64, (moved, self._distances[t]))
            for t, (total, moved, _) in enumerate(sums)
        ]


def _write_recorded_(row: SwitchRow, piece: slice, lam: float) -> tuple[int, float]:
    """Write a piece of a row; return what it adds to the checksum, and Σ (w − b)(i − b), which of a
    copy of a side is not summed."""
    w, b, i = (tensor[piece] for tensor in row.operands)
    chunk = piece.start * w.itemsize // CHUNK_BYTES
    if row.draw is None and row.intermediate_dtype is None:
        summed = lerp_summed_(w, b, i, lam, chunk)
        if summed is not None:
            return summed
    is_copy = _is_copy(row, lam)
    total, moved = 0, 0.0
    for part in pieces(w.numel(), SUMMED):
        draw = row.draw and Draw(row.draw.key, row.draw.start + piece.start + part.start)
        lerp_piece_(w[part], b[part], i[part], lam, row.intermediate_dtype, draw)
        total += piece_checksum(w[part], chunk + part.start * w.itemsize // CHUNK_BYTES)
        moved = moved if is_copy else projection(w[part], b[part], i[part], moved)
    return total, moved


def lerp_summed_(
    w: Tensor, b: Tensor, i: Tensor, lam: float, first_chunk: int
) -> tuple[int, float] | None:
    """Write `reference.lerp` of flat tensors on the CPU into `w`, and sum in the same pass: by the
    loops of `compiled`.

    Args:
        lam: an fp32 number.
        first_chunk: chunks of the checksum before these elements in their tensor.

    Returns:
        What the elements add to the checksum of `w`, not yet reduced mod 2⁶⁴, and
        Σ (w − b)(i − b). None, with nothing written, where this process has no such loops or they
        cannot: they are for bf16, and for λ other than 0 and 1.

    Numerics: as `reference.lerp`, but for the payloads of NaN.
    """
    loops = compiled.ready()
    is_bf16 = w.dtype == b.dtype == i.dtype == torch.bfloat16
    if loops is None or not is_bf16 or lam in (0.0, 1.0) or w.data_ptr() % 8:
        return None
    base_near = abs(lam) < 0.5
    weight = np.float32(lam) if base_near else np.float32(lam) - np.float32(1)
    high = high_factors(first_chunk, -(-w.nbytes // CHUNK_BYTES)).numpy()
    sides = (side.view(torch.int16).numpy() for side in (w, b, i))
    total, moved = loops.lerp_(*sides, weight, base_near, low_factors().numpy(), high)
    return total, moved


def _is_copy(row: SwitchRow, lam: float) -> bool:
    """Return whether λ gives the row the very values of one of its sides."""
    w, b, i = row.operands
    return (
        lam in (0.0, 1.0) and row.intermediate_dtype is None and (i if lam else b).dtype == w.dtype
    )


def _is_single_pass(row: SwitchRow, lam: float) -> bool:
    """Return whether one torch operation writes the row, so that its pieces need no cache."""
    w, b, i = row.operands
    if row.intermediate_dtype is None and lam in (0.0, 1.0):
        return row.draw is None or _is_copy(row, lam)
    return row.draw is None and _is_direct(w, b, i, row.intermediate_dtype)


def merged(
    b: Tensor, i: Tensor, lam: float, dtype: torch.dtype, intermediate_dtype: torch.dtype | None
) -> Tensor:
    """Return `reference.lerp` of flat tensors on one device by operations of torch alone: code that
    has nothing in common with this package's kernels, to prove what they wrote."""
    out = torch.empty(b.numel(), dtype=dtype, device=b.device)
    with inference():
        lerp_piece_(out, b, i, reference.fp32(lam) + 0.0, intermediate_dtype)
    return out


def lerp_piece_(
    w: Tensor,
    b: Tensor,
    i: Tensor,
    lam: float,
    intermediate_dtype: torch.dtype | None = None,
    draw: Draw | None = None,
) -> None:
    """Write `reference.lerp` of flat tensors on one device into `w`, for a λ that is an fp32
    number; scratch of their size. Noise is drawn on a CPU alone."""
    first = intermediate_dtype or w.dtype
    source = i if lam else b
    is_endpoint = lam in (0.0, 1.0)
    if is_endpoint and (draw is None or source.dtype == first):
        w.copy_(source if intermediate_dtype is None else source.to(intermediate_dtype))
        return
    if draw is None and _is_direct(w, b, i, intermediate_dtype):
        torch.lerp(b, i, lam, out=w)
    else:
        if is_endpoint:
            x = source.float()
        elif torch_lerp_is_exact(torch.float32, w.device.type):
            wide_b, wide_i = b.float(), i.float()
            x = torch.lerp(wide_b, wide_i, lam)
            if _is_suspect(wide_b):
                _keep_equal_bits_(x, wide_b, wide_i)
        else:
            x = reference.lerp(b, i, lam, torch.float32)
        narrow = w if first == w.dtype else torch.empty(w.numel(), dtype=first, device=w.device)
        if draw is None:
            narrow.copy_(x)
        else:
            noise.stochastic_(narrow, x, draw)
        if narrow is not w:
            w.copy_(narrow)
    if w.dtype == b.dtype == i.dtype and intermediate_dtype is None and _is_suspect(b):
        _keep_equal_bits_(w, b, i)


def _is_direct(w: Tensor, b: Tensor, i: Tensor, intermediate_dtype: torch.dtype | None) -> bool:
    """Return whether torch.lerp can write `w` by itself."""
    one_dtype = intermediate_dtype is None and w.dtype == b.dtype == i.dtype
    return one_dtype and torch_lerp_is_exact(w.dtype, w.device.type)


def _is_suspect(b: Tensor) -> bool:
    """Return whether `b` may hold a −0 or a non-finite value: two reductions, since sums carry NaN
    and infinity along."""
    if b.numel() == 0:
        return False
    integers = b.view(BITS[b.dtype])
    return int(integers.amin()) == torch.iinfo(integers.dtype).min or not math.isfinite(b.sum())


def _needs_patch(b: Tensor, i: Tensor) -> bool:
    return _is_suspect(b) and bool((reference.same_bits(b, i) & ((b == 0) | ~b.isfinite())).any())


def _keep_equal_bits_(w: Tensor, b: Tensor, i: Tensor) -> None:
    """Give `w` its sources' bits where they agree: torch.lerp makes +0 of two −0, and NaN of two
    infinities."""
    kind = BITS[w.dtype]
    with inference():
        torch.where(reference.same_bits(b, i), b.view(kind), w.view(kind), out=w.view(kind))


@functools.cache
def torch_lerp_is_exact(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Return whether this build's `torch.lerp` has the contract's bits on this type of device, by a
    few hundred chosen values.

    Without fused multiply-add it has not: up to 40 % of fp32 results differ.
    """
    for b, i, lam in reference.probe(dtype):
        expected = reference.lerp(b, i, lam)
        with inference():
            lerped = torch.lerp(b.to(device), i.to(device), reference.fp32(lam)).cpu()
        # zeros of equal sources and what is not finite are patched wherever torch.lerp is used
        right = reference.same_bits(lerped, expected) | (expected == 0)
        if not bool((right | ~b.isfinite()).all()):
            return False
    return True

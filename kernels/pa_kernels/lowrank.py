"""The low-rank merge: live matrices rewritten in place as B + λ·UV for any λ, always from B, by one
fused pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pa_kernels.cores import inference, one_core, over_cores
from pa_kernels.precision import full_precision
from pa_kernels.switch import (
    Switch,
    SwitchGroup,
    SwitchRow,
    check_place,
    check_tensor,
    checked_intermediate,
    columns,
    one_for_each,
    refuse_flushed_denormals,
)
from pa_kernels.tiles import RowBlocks, is_on_cpu

ROWS, COLUMNS = 128, 1024
"""The CPU's tile: a product of 0.5 MB that stays in a core's L2 between the passes over it. Tiles
lie on one grid per matrix and each is computed alike wherever it is asked for, since the order of a
product's sums may depend on its shape."""

RANK_STEP = 16
"""What a GPU's matrix units take of R at a time: factors of another rank are padded with zeros,
which change no sum."""


class LowRank(Switch[Any]):
    """T live matrices, or stacks of E matrices, each with its base and the two factors of its
    delta, ready for any λ.

    Args:
        out: live tensors [M, N] or [E, M, N], rewritten in place; contiguous bf16, fp16 or fp32.
        base: B, same shapes, in any of these dtypes; where the live tensor is, or in pinned host
            memory, which a GPU reads where it lies.
        u, v: U [..., M, R] and V [..., R, N] where the live tensor is, of one dtype for both; R
            differs from tensor to tensor and may be 0. On a GPU multiples of RANK_STEP are used as
            they are, others copied (`padded`).
        intermediate_dtypes: for each tensor the dtype that its result is rounded to before its own,
            or None.

    The sources must not change afterwards, and no live tensor may overlap one; neither is checked
    here.

    Numerics:
        `reference.lowrank`, with UV summed in fp32. The result is B + λ·UV within

            |λ| · (R + 1) · 2⁻²³ · Σ_k |u_k·v_k|  +  1 ulp of the result

        (or of its intermediate dtype, where that is coarser) as long as no product underflows: R
        roundings of 2⁻²⁴ of at most Σ|u_k·v_k| in a sum of any order, twice that where matrix units
        cut instead of round; 2⁻²⁴ of λ·UV where it is rounded before B is added; and half an ulp
        for either of the last two roundings. In bf16 and fp16 the first term is far below an ulp,
        unless B and λ·UV cancel, so results are within one ulp of the reference. In fp32 it is not:
        where the terms of UV cancel each other it may be thousands of ulps.

        Sums have one order per device and tensor, so the same λ gives the same bits, whatever came
        before. λ = 0 is B, bit for bit where the dtypes agree, and where UV is 0 the value is B's,
        −0 included.

    Cost:
        A switch reads B and writes the live tensor, 4 bytes per bf16 weight, and computes 2R
        operations per weight.

    Raises:
        ValueError, TypeError: naming entry t, what it is and what was expected.
    """

    def __init__(
        self,
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        intermediate_dtypes: Sequence[torch.dtype | None] | None = None,
    ):
        lists = {
            "live tensors": out,
            "base": base,
            "U": u,
            "V": v,
            "intermediate dtypes": intermediate_dtypes,
        }
        super().__init__([_checked(t, *column) for t, column in enumerate(columns(lists))])
        self._positions = {
            t: (group, index) for group in self.groups for index, t in enumerate(group.entries)
        }

    def _group(self, on_cpu: bool) -> type[Any]:
        if on_cpu:
            return LowRankCpuGroup
        from pa_kernels import lowrank_triton

        return lowrank_triton.LowRankTritonGroup

    def merged(self, t: int, rows: slice, lam: float) -> Tensor:
        """Rows of W(λ) of entry t, seen as [E·M, N], made afresh: the bits that `run_` writes
        there, whatever the live ones are.

        Cost: the tiles that hold these rows, so whole multiples of ROWS are cheapest; scratch of
            their size.

        Raises:
            ValueError: λ is not finite in fp32, or `rows` is not a plain range of the tensor's
                rows.
        """
        (lam,) = one_for_each(lam, 1)
        group, index = self._positions[t]
        count, height, width = group.rows[index].out.shape
        if (
            rows.step not in (None, 1)
            or None in (rows.start, rows.stop)
            or not 0 <= rows.start <= rows.stop <= count * height
        ):
            raise ValueError(
                f"entry {t}: rows {rows}, expected a range within its {count * height} rows"
            )
        cut = group.cuts[index]
        blocks = cut.covering(rows)
        whole = cut.rows(blocks)
        out = group.rows[index].out
        aside = torch.empty(whole.stop - whole.start, width, dtype=out.dtype, device=out.device)
        group.merge_blocks_(aside, index, blocks, lam)
        return aside[rows.start - whole.start : rows.stop - whole.start]


def lowrank_merge_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    lam: float | Sequence[float],
    *,
    intermediate_dtypes: Sequence[torch.dtype | None] | None = None,
) -> None:
    """Write W(λ) = B + λ·UV into `out`, once; see `LowRank` for the arguments, and for many λ."""
    LowRank(out, base, u, v, intermediate_dtypes).run_(lam)


def padded(u: Tensor, v: Tensor, step: int = RANK_STEP) -> tuple[Tensor, Tensor]:
    """Factors whose rank is a multiple of `step`, by zeros that change nothing: these very tensors
    where it already is."""
    more = -u.shape[-1] % step
    if more == 0:
        return u, v
    wide = u.new_zeros(*u.shape[:-1], u.shape[-1] + more)
    long = v.new_zeros(*v.shape[:-2], v.shape[-2] + more, v.shape[-1])
    wide[..., : u.shape[-1]] = u
    long[..., : v.shape[-2], :] = v
    return wide, long


def _checked(
    t: int, w: Tensor, b: Tensor, u: Tensor, v: Tensor, intermediate: torch.dtype | None
) -> SwitchRow:
    sides = {"live": w, "base": b, "U": u, "V": v}
    for side, tensor in sides.items():
        check_tensor(t, side, tensor)
        check_place(t, side, tensor, w, may_be_pinned=side == "base")
    if w.dim() not in (2, 3):
        raise ValueError(
            f"entry {t}: live has shape {tuple(w.shape)}, expected [M, N] or [E, M, N]"
        )
    rank = u.shape[-1] if u.dim() else 0
    shapes = {
        "base": w.shape,
        "U": (*w.shape[:-1], rank),
        "V": (*w.shape[:-2], rank, w.shape[-1]),
    }
    for side, shape in shapes.items():
        if sides[side].shape != shape:
            raise ValueError(
                f"entry {t}: {side} has shape {tuple(sides[side].shape)}, expected {tuple(shape)}"
                f" beside a live tensor {tuple(w.shape)} and rank {rank}"
            )
    if u.dtype != v.dtype:
        raise TypeError(
            f"entry {t}: U is {u.dtype} and V is {v.dtype}, expected one dtype for both"
        )
    intermediate = checked_intermediate(t, intermediate, w)
    # a matrix is a stack of one
    w, b, u, v = (
        tensor.detach() if tensor.dim() == 3 else tensor.detach()[None] for tensor in (w, b, u, v)
    )
    return SwitchRow((w, b, u, v) if is_on_cpu(w) else (w, b, *padded(u, v)), intermediate)


class LowRankCpuGroup(SwitchGroup[SwitchRow]):
    """All CPU tensors of a `LowRank`."""

    def __init__(self, entries: Sequence[int], rows: Sequence[SwitchRow]):
        super().__init__(entries, rows)
        self.cuts = [RowBlocks(row.out.shape[0], row.out.shape[1], ROWS) for row in rows]

    def launch_(self) -> None:
        work: list[_Work] = []
        for index, (row, lam) in enumerate(zip(self.rows, self.lams.tolist())):
            work += self._work(row.out.flatten(0, 1), index, self.cuts[index].all, lam)
        _merge_(work)

    def merge_blocks_(self, aside: Tensor, index: int, blocks: range, lam: float) -> None:
        """Write these blocks of W(λ) of a row into `aside`, which has as many rows."""
        _merge_(list(self._work(aside, index, blocks, lam)))

    def _work(self, out: Tensor, index: int, blocks: range, lam: float) -> Iterator[_Work]:
        row, cut = self.rows[index], self.cuts[index]
        first = cut.rows(blocks).start
        for k in blocks:
            whole = cut.rows(range(k, k + 1))
            e, rows = cut.block(k)
            yield out[whole.start - first : whole.stop - first], row, e, rows, lam


_Work = tuple[Tensor, SwitchRow, int, slice, float]
"""Rows to write, and whose they are: rows of a matrix e of an entry, for λ."""


def _merge_(work: Sequence[_Work]) -> None:
    refuse_flushed_denormals()
    with full_precision():
        over_cores(lambda one: _merge_rows_(*one), work)


def _merge_rows_(w: Tensor, row: SwitchRow, e: int, rows: slice, lam: float) -> None:
    """Write rows of matrix e into `w`, tile by tile."""
    _, base, u, v = row.operands
    with inference(), one_core():
        b = base[e, rows]
        if lam == 0.0:
            w.copy_(b if row.intermediate_dtype is None else b.to(row.intermediate_dtype))
            return
        # the fma's weight is never positive: where UV is 0 it adds −0, and a −0 of the base stays
        factor = u[e, rows].float() if lam < 0 else -u[e, rows].float()
        scratch = torch.empty(w.shape[0] * COLUMNS, dtype=torch.float32, device="cpu")
        for start in range(0, w.shape[1], COLUMNS):
            tile = w[:, start : start + COLUMNS]
            delta = scratch[: tile.numel()].view(tile.shape)
            torch.mm(factor, v[e, :, start : start + COLUMNS].float(), out=delta)
            torch.add(b[:, start : start + COLUMNS].float(), delta, alpha=-abs(lam), out=delta)
            tile.copy_(
                delta if row.intermediate_dtype is None else delta.to(row.intermediate_dtype)
            )

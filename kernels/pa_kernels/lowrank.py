"""The low-rank merge: live matrices rewritten in place as B + λ·UV for any λ, always from B, by one
fused pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pa_kernels.cores import inference, one_core, over_cores
from pa_kernels.precision import full_precision
from pa_kernels.reference import LIVE_DTYPES
from pa_kernels.switch import Group, Switch, one_for_each, refuse_flushed_denormals
from pa_kernels.tiles import INTERPRETED

ROWS, COLUMNS = 128, 1024
"""The CPU's tile: a product of 0.5 MB that stays in a core's L2 between the passes over it. Tiles
lie on one grid per matrix and each is computed alike wherever it is asked for, since the order of a
product's sums may depend on its shape."""

RANK_STEP = 16
"""What a GPU's matrix units take of R at a time: factors of another rank are padded with zeros,
which change no sum."""


class LowRank(Switch):
    """T live matrices, or stacks of E matrices, each with its base and the two factors of its
    delta, ready for any λ.

    Args:
        out: live tensors [M, N] or [E, M, N], rewritten in place; contiguous bf16, fp16 or fp32.
        base: B, same shapes, in any of these dtypes; where the live tensor is, or in pinned host
            memory, which a GPU reads where it lies.
        u, v: U [..., M, R] and V [..., R, N] where the live tensor is, of one dtype for both; R
            differs from tensor to tensor and may be 0. On a GPU multiples of RANK_STEP are used as
            they are, others copied (`padded`).
        via: for each tensor the dtype that its result is rounded to before its own, or None.

    The sources must not change afterwards, and no live tensor may overlap one; neither is checked
    here.

    Attributes:
        groups: one per (out, base, factors, via) dtype tuple and GPU, and one for all CPU tensors.

    Numerics:
        `reference.lowrank`, with UV summed in fp32. The result is B + λ·UV within

            |λ| · (R + 1) · 2⁻²³ · Σ_k |u_k·v_k|  +  1 ulp of the result

        (or of `via`, where that is coarser) as long as no product underflows: R roundings of 2⁻²⁴
        of at most Σ|u_k·v_k| in a sum of any order, twice that where matrix units cut instead of
        round; 2⁻²⁴ of λ·UV where it is rounded before B is added; and half an ulp for either of the
        last two roundings. In bf16 and fp16 the first term is far below an ulp, unless B and λ·UV
        cancel, so results are within one ulp of the reference. In fp32 it is not: where the terms
        of UV cancel each other it may be thousands of ulps.

        Sums have one order per device and tensor, so the same λ gives the same bits, whatever came
        before. λ = 0 is B, bit for bit where the dtypes agree, and where UV is 0 the value is B's,
        −0 included.

    Cost:
        A switch reads B and writes the live tensor, 4 bytes per bf16 weight, and computes 2R
        operations per weight.

    Raises:
        ValueError, TypeError: naming entry t and what was found and expected.
    """

    def __init__(
        self,
        out: Sequence[Tensor],
        base: Sequence[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        via: Sequence[torch.dtype | None] | None = None,
    ):
        self.count = len(out)
        self._rows = _checked(out, base, u, v, via)
        on_cpu = [
            t
            for t, row in enumerate(self._rows)
            if row.out.device.type == "cpu" and not INTERPRETED
        ]
        self.groups: tuple[_MergingGroup, ...] = (
            (_CpuGroup(on_cpu, [self._rows[t] for t in on_cpu]),) if on_cpu else ()
        )
        self.groups += tuple(
            _triton_groups(self._rows, sorted(set(range(self.count)) - set(on_cpu)))
        )
        self._places = {
            t: (group, place) for group in self.groups for place, t in enumerate(group.entries)
        }

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
        count, height, _ = self._rows[t].out.shape
        if (
            rows.step not in (None, 1)
            or None in (rows.start, rows.stop)
            or not 0 <= rows.start <= rows.stop <= count * height
        ):
            raise ValueError(
                f"entry {t}: rows {rows}, expected a range within its {count * height} rows"
            )
        group, place = self._places[t]
        return group.merged(place, rows, lam)


class _MergingGroup(Group, Protocol):
    """A group that can also make the rows of one of its tensors aside."""

    def merged(self, place: int, rows: slice, lam: float) -> Tensor: ...


def lowrank_merge_(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    lam: float | Sequence[float],
    *,
    via: Sequence[torch.dtype | None] | None = None,
) -> None:
    """Write W(λ) = B + λ·UV into `out`, once; see `LowRank` for the arguments, and for many λ."""
    LowRank(out, base, u, v, via).run_(lam)


def padded(u: Tensor, v: Tensor, step: int = RANK_STEP) -> tuple[Tensor, Tensor]:
    """Factors whose rank is a multiple of `step`, by zeros that change nothing: these very tensors
    where it already is."""
    more = -u.shape[-1] % step
    if more == 0:
        return u, v
    wide = torch.zeros(*u.shape[:-1], u.shape[-1] + more, dtype=u.dtype, device=u.device)
    long = torch.zeros(
        *v.shape[:-2], v.shape[-2] + more, v.shape[-1], dtype=v.dtype, device=v.device
    )
    wide[..., : u.shape[-1]] = u
    long[..., : v.shape[-2], :] = v
    return wide, long


@dataclass(frozen=True)
class Row:
    """One entry: live tensor and base [E, M, N], U [E, M, R], V [E, R, N], all detached, and the
    dtype to round to first.

    Its rows, seen as [E·M, N], are cut into blocks of `step` that never span two matrices.
    """

    out: Tensor
    base: Tensor
    u: Tensor
    v: Tensor
    via: torch.dtype | None

    def blocks(self, step: int) -> int:
        """How many blocks there are."""
        return self.out.shape[0] * -(-self.out.shape[1] // step)

    def block(self, k: int, step: int) -> tuple[int, slice]:
        """Block k: which matrix, and its rows there."""
        height = self.out.shape[1]
        e, down = divmod(k, -(-height // step))
        return e, slice(down * step, min((down + 1) * step, height))

    def covering(self, rows: slice, step: int) -> range:
        """The blocks that hold these of the E·M rows."""
        if rows.start == rows.stop:
            return range(0)
        height = self.out.shape[1]
        first, last = (
            at // height * -(-height // step) + at % height // step
            for at in (rows.start, rows.stop - 1)
        )
        return range(first, last + 1)

    def span(self, blocks: range, step: int) -> tuple[int, int]:
        """The first of the E·M rows in these blocks, and the one past the last."""
        if not blocks:
            return 0, 0
        (first, head), (last, tail) = self.block(blocks[0], step), self.block(blocks[-1], step)
        return first * self.out.shape[1] + head.start, last * self.out.shape[1] + tail.stop


class _CpuGroup:
    """All CPU tensors of a `LowRank`."""

    def __init__(self, entries: Sequence[int], rows: Sequence[Row]):
        self.entries = tuple(entries)
        self.rows = rows
        self.lams = torch.zeros(len(rows), dtype=torch.float32, device="cpu")

    def launch_(self) -> None:
        refuse_flushed_denormals()
        lams = self.lams.tolist()

        def write(at: tuple[int, int]) -> None:
            row, (e, block) = self.rows[at[0]], self.rows[at[0]].block(at[1], ROWS)
            _merge_rows_(row.out[e, block], row, e, block, lams[at[0]])

        with full_precision():
            over_cores(
                write,
                [
                    (place, k)
                    for place, row in enumerate(self.rows)
                    for k in range(row.blocks(ROWS))
                ],
            )

    def merged(self, place: int, rows: slice, lam: float) -> Tensor:
        refuse_flushed_denormals()
        row = self.rows[place]
        blocks = row.covering(rows, ROWS)
        first, last = row.span(blocks, ROWS)
        made = torch.empty(last - first, row.out.shape[2], dtype=row.out.dtype, device="cpu")

        def write(k: int) -> None:
            start, stop = (at - first for at in row.span(range(k, k + 1), ROWS))
            _merge_rows_(made[start:stop], row, *row.block(k, ROWS), lam)

        with full_precision():
            over_cores(write, blocks)
        return made[rows.start - first : rows.stop - first]


def _merge_rows_(w: Tensor, row: Row, e: int, block: slice, lam: float) -> None:
    """Write the rows `block` of matrix e into `w`, tile by tile."""
    with inference(), one_core():
        b = row.base[e, block]
        if lam == 0.0:
            w.copy_(b if row.via is None else b.to(row.via))
            return
        # the fma's weight is never positive: where UV is 0 it adds −0, and a −0 of the base stays
        left = row.u[e, block].float() if lam < 0 else -row.u[e, block].float()
        scratch = torch.empty(w.shape[0] * COLUMNS, dtype=torch.float32, device="cpu")
        for start in range(0, w.shape[1], COLUMNS):
            tile = w[:, start : start + COLUMNS]
            delta = scratch[: tile.numel()].view(tile.shape)
            torch.mm(left, row.v[e, :, start : start + COLUMNS].float(), out=delta)
            torch.add(b[:, start : start + COLUMNS].float(), delta, alpha=-abs(lam), out=delta)
            tile.copy_(delta if row.via is None else delta.to(row.via))


def _triton_groups(rows: Sequence[Row], entries: Sequence[int]) -> list[_MergingGroup]:
    if not entries:
        return []
    from pa_kernels import lowrank_triton

    kinds: dict[tuple[object, ...], list[int]] = {}
    for t in entries:
        row = rows[t]
        kinds.setdefault(
            (row.out.device, row.out.dtype, row.base.dtype, row.u.dtype, row.via), []
        ).append(t)
    return [lowrank_triton.Group(members, [rows[t] for t in members]) for members in kinds.values()]


def _checked(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    via: Sequence[torch.dtype | None] | None,
) -> list[Row]:
    vias = [None] * len(out) if via is None else list(via)
    if not len(out) == len(base) == len(u) == len(v) == len(vias):
        raise ValueError(
            f"{len(out)} live tensors, {len(base)} base, {len(u)} U, {len(v)} V, {len(vias)} via:"
            " expected as many of each"
        )
    rows: list[Row] = []
    for t, (w, b, left, right, rounding) in enumerate(zip(out, base, u, v, vias)):
        for side, tensor in (("live", w), ("base", b), ("U", left), ("V", right)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in LIVE_DTYPES:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(
                    f"entry {t}: {side} is {found}, expected a tensor of bfloat16, float16 or"
                    " float32"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"entry {t}: {side} has strides {tensor.stride()} for shape"
                    f" {tuple(tensor.shape)}, expected contiguous"
                )
            if tensor.device != w.device and not (
                side == "base" and w.device.type == "cuda" and tensor.is_pinned()
            ):
                raise ValueError(
                    f"entry {t}: {side} is on {tensor.device}, the live tensor on {w.device}"
                )
        if w.device.type not in ("cpu", "cuda"):
            raise ValueError(f"entry {t}: on {w.device}, expected cpu or cuda")
        if w.dim() not in (2, 3):
            raise ValueError(
                f"entry {t}: live has shape {tuple(w.shape)}, expected [M, N] or [E, M, N]"
            )
        rank = left.shape[-1] if left.dim() else 0
        for side, tensor, expected in (
            ("base", b, w.shape),
            ("U", left, (*w.shape[:-1], rank)),
            ("V", right, (*w.shape[:-2], rank, w.shape[-1])),
        ):
            if tensor.shape != expected:
                raise ValueError(
                    f"entry {t}: {side} has shape {tuple(tensor.shape)}, expected {tuple(expected)}"
                    f" beside a live tensor {tuple(w.shape)} and rank {rank}"
                )
        if left.dtype != right.dtype:
            raise TypeError(
                f"entry {t}: U is {left.dtype} and V is {right.dtype}, expected one dtype for both"
            )
        if rounding is not None and rounding not in LIVE_DTYPES:
            raise TypeError(
                f"entry {t}: via is {rounding}, expected bfloat16, float16, float32 or None"
            )
        # rounding to fp32, or twice to the same dtype, changes nothing
        rounding = None if rounding in (torch.float32, w.dtype) else rounding
        rows.append(Row(_stacked(w), _stacked(b), _stacked(left), _stacked(right), rounding))
    return rows


def _stacked(tensor: Tensor) -> Tensor:
    """A matrix as a stack of one."""
    return tensor.detach() if tensor.dim() == 3 else tensor.detach()[None]

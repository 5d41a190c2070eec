"""The packed switch: live tensors rewritten in place from W(λ) to W(λ′) by codes alone, with the
bits of `reference.lerp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pa_kernels.checksum import checksum
from pa_kernels.cores import inference
from pa_kernels.packed import cpu
from pa_kernels.packed.codes import LAYOUTS, PackedTensor, of_lower_parity, packed_bytes
from pa_kernels.packed.state import PackedRow, State, signed
from pa_kernels.reference import MANTISSA
from pa_kernels.switch import (
    Switch,
    by_entry,
    check_place,
    check_tensor,
    columns,
    one_for_each,
)

__all__ = [
    "LAYOUTS",
    "Packed",
    "PackedTensor",
    "of_lower_parity",
    "packed_bytes",
    "packed_pair",
    "packed_switch_",
    "packed_target",
]


class Packed(Switch[Any]):
    """T live tensors whose deltas are codes, prepared once. What they hold is all that is known of
    base and target.

    Args:
        out: live tensors, rewritten in place; contiguous bf16 or fp16, on the CPU or a GPU.
        entries: a `PackedTensor` for each, of its dtype and number of elements; on a GPU codes and
            exceptions may also lie in pinned host memory. Checked here: whatever a file held, no
            write leaves its tensor.

    Numerics:
        Bit for bit `reference.lerp` of base and target, after any walk of λ within the range of the
        codes, provided that the live tensors were right when `holds` was called, and that nobody
        else writes to them. Every switch sums what it reads and what it leaves, so that a foreign
        write is noticed: see `wrong`. What it then leaves is of no use.

    Cost:
        A switch reads and writes the live tensors and reads the codes: 5 bytes per weight of 8-bit
        codes, 6 of 16-bit ones, both checksums included.

    Raises:
        ValueError, TypeError: naming entry t, what it is and what was expected.
    """

    def __init__(self, out: Sequence[Tensor], entries: Sequence[PackedTensor]):
        lists = columns({"live tensors": out, "packed": entries})
        super().__init__([_checked(t, *column) for t, column in enumerate(lists)])
        self.ranges = [entry.range for entry in entries]

    def _group(self, on_cpu: bool) -> type[Any]:
        if on_cpu:
            return cpu.PackedCpuGroup
        from pa_kernels.packed import triton

        return triton.PackedTritonGroup

    def holds(self, lam: float | Sequence[float]) -> None:
        """Take the live tensors, as they are, for W(λ): one λ for all, or one for each. Reads them
        once."""
        lams = self._within(lam)
        for group in self.groups:
            with inference():
                sums = checksum([row.out for row in group.rows])
                group.state.hold_(by_entry(group, lams), signed(sums))

    def run_(self, lam: float | Sequence[float]) -> None:
        """Rewrite every live tensor for λ, one for all or one for each.

        Raises:
            ValueError: a λ is outside the range of its codes, or there are not as many as tensors.
        """
        self._within(lam)
        super().run_(lam)

    def launch_(self) -> None:
        for group in self.groups:
            group.launch_()
            group.state.switched_(group.lams)

    def wrong(self) -> list[int]:
        """Entries whose live tensor did not hold what the last switch had left, or `holds` was
        told. Waits for the device."""
        return [
            t for t, is_wrong in enumerate(self._by_entry(lambda state: state.wrong)) if is_wrong
        ]

    def sums(self) -> list[int]:
        """The checksum that each live tensor has, by what was written to it. Waits for the
        device."""
        return [total % 2**64 for total in self._by_entry(lambda state: state.sums)]

    def holding(self, t: int) -> float:
        """The fp32 λ that live tensor t holds, by what was written to it. Waits for the device."""
        return float(self._by_entry(lambda state: state.olds)[t])

    def _by_entry(self, table: Callable[[State], Tensor]) -> list[Any]:
        """The values of a table of the states, by entry."""
        values = {
            t: value
            for group in self.groups
            for t, value in zip(group.entries, table(group.state).tolist())
        }
        return [values[t] for t in range(self.count)]

    def _within(self, lam: float | Sequence[float]) -> list[float]:
        lams = one_for_each(lam, self.count)[: self.count]
        for t, (one, (lo, hi)) in enumerate(zip(lams, self.ranges)):
            if not lo <= one <= hi:
                raise ValueError(
                    f"entry {t}: λ = {one:g} is outside [{lo:g}, {hi:g}], for which its codes are"
                )
        return lams


def packed_switch_(
    out: Sequence[Tensor],
    entries: Sequence[PackedTensor],
    old: float | Sequence[float],
    new: float | Sequence[float],
) -> None:
    """Rewrite `out`, which holds W(old), to W(new), once; see `Packed` for the arguments, and for
    many λ."""
    packed = Packed(out, entries)
    packed.holds(old)
    packed.run_(new)


def packed_pair(
    live: Tensor, entry: PackedTensor, span: slice, lam: float
) -> tuple[Tensor, Tensor]:
    """Base and target of the elements `span`, which begins with a tile, from what `live` holds of
    W(λ): copies, on its device.

    Args:
        live: flat; all N elements.

    Numerics: exact where `live` holds W(λ).
    """
    with inference():
        w, codes = live[span].view(torch.int16), entry.element_codes(span)
        offsets = cpu.pattern_offsets(entry.width, entry.dtype, lam).to(w.device)
        b, i, _ = cpu.packed_sources(w, codes, offsets, entry.dtype, lam)
        positions, base, target = entry.exceptions(span)
        for side, values in ((b, base), (i, target)):
            side[positions] = values.view(torch.int16)
        return b.view(entry.dtype), i.view(entry.dtype)


def packed_target(base: Tensor, entry: PackedTensor, span: slice) -> Tensor:
    """Target of the elements `span`, which begins with a tile, from those of the base: a copy."""
    target = base.view(torch.int16) + (entry.element_codes(span) >> 1)
    positions, _, values = entry.exceptions(span)
    target[positions] = values.view(torch.int16)
    return target.view(entry.dtype)


def _checked(t: int, w: Tensor, entry: PackedTensor) -> PackedRow:
    check_tensor(t, "live", w, tuple(MANTISSA))
    if not isinstance(entry, PackedTensor):
        raise TypeError(f"entry {t}: packed is {type(entry).__name__}, expected a PackedTensor")
    if w.numel() != entry.numel or w.dtype != entry.dtype:
        raise ValueError(
            f"entry {t}: live has {w.numel()} {w.dtype}, the codes are for {entry.numel}"
            f" {entry.dtype}"
        )
    check_place(t, "codes", entry.codes, w, may_be_pinned=True)
    try:
        entry.check()
    except ValueError as error:
        raise ValueError(f"entry {t}: {error}") from None
    lists = entry.starts, entry.where
    crossing = entry.crossing_starts, entry.crossing
    # a kernel for the layout without them takes as many pointers, and reads none of these
    rest = [own if other is None else other for own, other in zip(lists, crossing)]
    sources = entry.codes, *lists, entry.base, entry.target, *rest
    return PackedRow((w.detach().view(-1), *sources), entry=entry)

"""The packed store: for every weight a code from which W(λ′) follows W(λ). Base and instruct are
not kept: the live copy and the codes determine them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pa_kernels
import torch
from pa_kernels.packed import LAYOUTS, PackedTensor, of_lower_parity, packed_pair, packed_target
from pa_kernels.reference import MANTISSA, same_bits
from pa_kernels.switch import Written
from torch import Tensor

from pa_fast.checkpoint.safetensors import TensorInfo, torch_dtype
from pa_fast.errors import DataError, UsageError, WeightsError
from pa_fast.stores.store import (
    DenseEntry,
    Entry,
    Overwritten,
    PartRule,
    Source,
    Store,
    TensorDescription,
    TensorSize,
    floats,
    lists,
)

_SPEED, _LISTS = "-speed", ("crossing_starts", "crossing")
"""Of entries in the layout `speed`: the end of their kind, and the tensors that they have more."""

_SAMPLES, _SAMPLE = 24, 1 << 16
"""Pieces, and elements of each, from which the size of the codes is estimated."""


@dataclass
class PackedStore(Store):
    """Codes of 8 or 16 bits for each tensor, whichever take fewer bytes, or of 8 bits in the layout
    `speed`. A tensor for which codes would take more than both sides is held in full.

    Tensors that codes cannot represent are held in full too: tensors of fp32, sides that the live
    dtype does not hold exactly, and merges that are rounded to another dtype first. A switch starts
    from what the live tensors hold. So it sums what it reads: a foreign write, or a switch that did
    not finish, makes the tensors stale, and they must be written again from the base.

    Args:
        lo, hi: the range of λ, which includes [0, 1]. A wider range costs more: past [0, 1] a code
            represents only weights that stay within one power of two over the whole range; for the
            others both values are kept.
        layout: `size`, or `speed`, for GPUs: weights whose two values lie in two powers of two are
            listed, so that a switch takes less than half as many instructions for all others. On a
            CPU a switch is the same.

    Numerics: bit for bit the contract between base and instruct, within the range; switches lose
    nothing to rounding.
    Cost: 1 to 1.5 bytes per bf16 weight where I − B is up to 4 % of the weights, 2.5 at 23 %,
        beside the live 2; 6 bytes per exception. The layout `speed` takes .09 more at 1.7 %, .17 at
        4.4 %: 2 bytes per listed weight. A switch reads and writes the live copy and reads the
        codes. Encoding reads the sources once or twice and checks each tensor by two switches,
        and two more if the range is wider than [0, 1]; scratch for two copies of the largest.

    Raises:
        UsageError: the range does not include 0 and 1, or is not finite; or there is no such
            layout.
    """

    lo: float = 0.0
    hi: float = 1.0
    layout: str = "size"

    name = "packed"
    entry = PackedTensor
    kinds = ("packed8", "packed16", "packed8-speed")
    part_names = ("codes", "starts", "where", "base", "target", "span")
    options = ("range", "layout")
    host_parts = ("span",)
    needs_base = False
    range_hint = (
        "choose λ within it; for others encode with a wider range (`pa-fast encode --range LO:HI`,"
        " PackedStore(lo, hi)), or use the dense store"
    )

    def __post_init__(self) -> None:
        if not (-1e6 <= self.lo <= 0.0 and 1.0 <= self.hi <= 1e6):
            raise UsageError(
                f"range {self.lo:g}:{self.hi:g}, expected the least λ from -1e6 to 0 and the"
                " largest from 1 to 1e6",
                "a range holds 0 and 1, such as -0.2:1.5",
            )
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout `{self.layout}`", f"available: {', '.join(LAYOUTS)}")
        self.range = self.lo, self.hi

    @classmethod
    def of_options(cls, **options: Any) -> Store:
        return cls(*options.pop("range", ()), **options)

    def describe(self) -> str:
        """Return all options in one line."""
        usual = (self.lo, self.hi) == (0.0, 1.0)
        lambdas = "" if usual else f", λ from {self.lo:g} to {self.hi:g}"
        return self.name + lambdas + (", layout speed" if self.layout == "speed" else "")

    def encode(self, sources: Sequence[Source]) -> Iterator[Entry]:
        """Yield the entry of each source, in order and one at a time.

        Raises:
            DataError: codes do not reproduce the weights that they were made of.
        """
        for source in sources:
            base, instruct = source.on_device()
            yield self._codes(source, base, instruct) or DenseEntry(instruct)

    def _codes(self, source: Source, base: Tensor, instruct: Tensor) -> PackedTensor | None:
        if source.dtype not in MANTISSA or source.intermediate_dtype not in (None, source.dtype):
            return None
        sides = [_exactly(side, source.dtype) for side in (base, instruct)]
        if any(side is None for side in sides):
            return None
        b, i = (side.reshape(-1) for side in sides if side is not None)
        entry = PackedTensor.encode(b, i, (self.lo, self.hi), layout=self.layout)
        if entry is None or entry.nbytes >= base.nbytes + instruct.nbytes:
            return None
        _check_codes(source.name, entry, b, i)
        return entry

    def estimate(self, sizes: Sequence[TensorSize]) -> int:
        """Return the bytes of the codes, estimated from pieces of the largest tensors; those of
        dense if no tensors are at hand."""
        largest = sorted(sizes, key=lambda size: -size.beside_bytes)
        sampled = [size.sides for size in largest if size.sides is not None][:_SAMPLES]
        taken = whole = 0
        for base, instruct in sampled:
            start = max(base.numel() - _SAMPLE, 0) // 2
            b, i = (side.reshape(-1)[start : start + _SAMPLE].cpu() for side in (base, instruct))
            fits = b.dtype == i.dtype and b.element_size() == 2
            codes = PackedTensor.encode(b, i, layout=self.layout) if fits else None
            both = b.nbytes + i.nbytes
            whole += both
            taken += both if codes is None else min(codes.nbytes, both)
        dense = sum(size.beside_bytes for size in sizes)
        return dense if not whole else int(dense * taken / whole)

    def prepare(self) -> None:
        self._switch = pa_kernels.Packed(self.live, self.entries)
        self._stale = True
        self._is_on_cpu = all(live.device.type == "cpu" for live in self.live)
        self._zeros: list[int] | None = None
        lows, highs = zip(*(entry.range for entry in self.entries))
        self.range = max(lows), min(highs)

    def set_(self, lam: float | Sequence[float]) -> None:
        assert not self._stale, "what these tensors hold is not known: restore_ them first"
        self._stale = True  # until the last byte is written, and the bytes before it were right
        self._switch.run_(lam)
        if self._is_on_cpu and (wrong := self._switch.wrong()):
            raise Overwritten(wrong)
        self._stale = False

    def overwritten(self) -> Sequence[int]:
        return self._switch.wrong()

    def written(self) -> Sequence[Written]:
        """Return the sums of what the last switch wrote; see `Store.written`."""
        return [Written(total) for total in self._switch.sums()]

    def restore_(self, base_of: Callable[[int], Tensor | None] = lambda k: None) -> None:
        """Write W(0) into every live tensor, whatever it held, from its base; see `Store.restore_`.

        Raises:
            WeightsError: a base is gone, or is not the one that these tensors were bound to.
        """
        self._stale = True
        for k, live in enumerate(self.live):
            kept = self._kept(k)
            source = base_of(k) if kept is None else kept.detach()
            if source is None:
                raise WeightsError(
                    "packed weights have to be written anew, and their base is gone: nothing but"
                    " their codes is kept",
                    "call resync(base) with the base tensors, or bind again",
                )
            live.copy_(source.view(live.shape))
        self._switch.holds(0.0)
        zeros = self._switch.sums()
        if self._zeros is None:
            self._zeros = zeros
        elif self._zeros != zeros:
            raise WeightsError(
                "these are not the base tensors that the live weights were bound to", "pass those"
            )
        self._stale = False

    def known_sum(self, k: int) -> int | None:
        """Return the sum of a tensor whose base is gone, by which alone it is known; see
        `Store.known_sum`."""
        return self._switch.sums()[k] if self._kept(k) is None else None

    def merged(self, k: int, span: slice, lam: float) -> Tensor:
        """Merge from base and codes; see `Store.merged`."""
        base = self._kept(k)
        assert base is not None, "ask `known_sum` first"
        start, end = self._from_base(k, span, base)
        out = torch.empty_like(start)
        pa_kernels.lerp_([out], [start], [end], lam)
        return out

    def endpoints(self, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """Return the endpoints from the base or, without one, from the live weights; see
        `Store.endpoints`."""
        base = self._kept(k)
        if base is not None:
            return self._from_base(k, span, base)
        lam = self._switch.holding(k)
        return packed_pair(self.live[k].view(-1), self.entries[k], span, lam)

    def _from_base(self, k: int, span: slice, base: Tensor) -> tuple[Tensor, Tensor]:
        live = self.live[k]
        start = base.view(-1)[span].to(device=live.device, dtype=live.dtype)
        return start, packed_target(start, self.entries[k], span)

    def _kept(self, k: int) -> Tensor | None:
        """Return the base of tensor k, if it still exists."""
        base = self.base[k]
        return base if isinstance(base, Tensor) else base()

    @classmethod
    def kind(cls, entry: PackedTensor) -> str:
        return f"packed{entry.width}{_SPEED if entry.layout == 'speed' else ''}"

    @classmethod
    def parts_of(cls, kind: str) -> tuple[str, ...]:
        return cls.part_names + (_LISTS if kind.endswith(_SPEED) else ())

    @classmethod
    def part_rules(
        cls, tensor: TensorDescription, infos: Mapping[str, TensorInfo]
    ) -> Iterator[PartRule]:
        yield from lists(infos, codes="I16", starts="I32", where="U16", span="F32")
        if tensor.kind.endswith(_SPEED):
            yield from lists(infos, crossing_starts="I32", crossing="U16")
        yield from floats(infos, "base", "target")
        where = infos["where"].shape
        for part in ("base", "target"):
            fits = infos[part].dtype == tensor.live and infos[part].shape == where
            yield part, fits, f"{tensor.live} {list(where)}"

    @classmethod
    def of_older_format(
        cls, tensor: TensorDescription, parts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give the codes the parity of the base; formats 1 and 2 had that of the lower pattern."""
        return {**parts, "codes": of_lower_parity(parts["codes"], cls._width(tensor))}

    @classmethod
    def _width(cls, tensor: TensorDescription) -> int:
        return int(tensor.kind.removeprefix("packed").removesuffix(_SPEED))

    @classmethod
    def from_parts(cls, tensor: TensorDescription, parts: Mapping[str, Tensor]) -> PackedTensor:
        numel = torch.Size(tensor.shape).numel()
        entry = PackedTensor(torch_dtype(tensor.live), numel, cls._width(tensor), **parts)
        entry.check()
        return entry

    @classmethod
    def misfit(cls, entry: PackedTensor, base: Tensor) -> str | None:
        """Name the weight whose code does not hold for every λ in the range, which λ = 0 and 1
        alone do not show.

        Files of earlier versions, for a range beyond [0, 1], may have codes of weights near the
        smallest normal number that do not.
        """
        weight = entry.misfit(base)
        if weight is None:
            return None
        lo, hi = entry.range
        listed = "" if entry.crossing is None else ", or it is wrongly listed as crossing, or not"
        return (
            f"the code of weight {weight} ({base.view(-1)[weight].item():g} in the base) does not"
            f" hold for every λ in [{lo:g}, {hi:g}]{listed}"
        )


def _exactly(side: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return `side` in `dtype`; None if that would change it."""
    if side.dtype == dtype:
        return side
    narrowed = side.to(dtype)
    return narrowed if bool(same_bits(narrowed.to(side.dtype), side).all()) else None


def _check_codes(name: str, entry: PackedTensor, base: Tensor, instruct: Tensor) -> None:
    """Switch a copy of the base to λ = 1, to the limits of the range and back, as live weights will
    be, and compare bit for bit."""
    live = base.clone()
    packed = pa_kernels.Packed([live], [entry])
    packed.holds(0.0)
    for lam in (1.0, *(lam for lam in entry.range if lam not in (0.0, 1.0)), 0.0):
        packed.run_(lam)
        expected = torch.empty_like(base)
        pa_kernels.lerp_([expected], [base], [instruct], lam)
        differs = ~same_bits(live, expected)
        if lam not in (0.0, 1.0):
            differs &= ~(live.isnan() & expected.isnan())  # the contract leaves their payload open
        if packed.wrong() or bool(differs.any()):
            raise DataError(
                f"`{name}`: its codes do not give back the weights at λ = {lam:g}",
                "a bug or failing memory; use --store dense",
            )

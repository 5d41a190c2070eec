"""Live tensors paired with their sources, and the checks that `LiveWeights.bind` makes before it
writes the first byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import ref

from pa_kernels.reference import LIVE_DTYPES

from pa_fast.errors import DataError, PairError, WeightsError
from pa_fast.live.memory import FileMaps
from pa_fast.stores import registry
from pa_fast.stores.store import Entry

if TYPE_CHECKING:
    import torch

_NAMED = "pass name → tensor, such as dict(model.named_parameters())"


@dataclass(frozen=True)
class Binding:
    """One live storage: its tensor, its source tensor of each side, and all its names."""

    names: tuple[str, ...]
    live: torch.Tensor
    sources: Mapping[str, torch.Tensor]
    intermediate_dtype: torch.dtype | None
    origin: ref[torch.Tensor] | None = None
    """A weak reference to the base tensor that the caller passed."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def base(self) -> torch.Tensor:
        return self.sources["base"]


def bindings(
    live: Mapping[str, torch.Tensor],
    sides: Mapping[str, Mapping[str, torch.Tensor]],
    intermediate_dtype: Mapping[str, torch.dtype],
    *,
    written: bool = True,
) -> list[Binding]:
    """Check the live tensors against those of each side, and join the names that share storage.

    Args:
        sides: `base`, and `instruct` unless a delta file takes its place; sources may be on another
            device than the live tensor.
        written: whether the live tensors will be written; if not, they may share memory with a
            source.

    Raises:
        PairError: names or shapes differ, or one storage has two different sources.
        WeightsError: a side is no name → tensor, or a live tensor cannot be written in place: not
            contiguous, overlapping, aliasing a source, of an unsupported kind.
        DataError: a tensor that is not interpolated differs between base and instruct.
    """
    import torch

    for role, tensors in {"live": live, **sides}.items():
        check_named(role, tensors)
    if not live:
        raise WeightsError("there is nothing to bind: `live` is empty", _NAMED)
    _check_names(live, sides)
    by_storage: dict[tuple[torch.device, int, int], Binding] = {}
    for name, tensor in live.items():
        given = {"live": tensor, **{side: tensors[name] for side, tensors in sides.items()}}
        for side, thing in given.items():
            if not isinstance(thing, torch.Tensor):
                raise WeightsError(
                    f"cannot bind `{name}`: {side} is a {type(thing).__name__}", "pass tensors"
                )
        sources = {side: given[side].detach() for side in sides}
        _check_one(name, tensor.detach(), sources)
        key = (tensor.device, tensor.data_ptr(), tensor.numel() * tensor.element_size())
        if tensor.numel() == 0:
            key = (tensor.device, -1 - len(by_storage), 0)
        if key in by_storage:
            by_storage[key] = _share(by_storage[key], name, tensor, sources)
        else:
            by_storage[key] = Binding(
                (name,), tensor.detach(), sources, intermediate_dtype.get(name), ref(given["base"])
            )
    checked = list(by_storage.values())
    if written:
        _check_overlap(checked)
    return checked


def check_named(role: str, tensors: object) -> None:
    """Raise WeightsError unless `tensors`, the ones of this role, have names."""
    if not isinstance(tensors, Mapping):
        raise WeightsError(
            f"cannot bind: `{role}` is a {type(tensors).__name__}, and a dict is expected", _NAMED
        )


def _check_names(live: Mapping[str, object], sides: Mapping[str, Mapping[str, object]]) -> None:
    for side, tensors in sides.items():
        missing = [name for name in live if name not in tensors]
        extra = [name for name in tensors if name not in live]
        if missing:
            raise PairError(
                f"cannot bind `{missing[0]}`: it is live, but {side} has no tensor of that"
                f" name{_more(missing)}",
                f"{_listed('live', *sides)} must have the same names",
            )
        if extra:
            raise PairError(
                f"cannot bind `{extra[0]}`: {side} has it, but there is no live tensor of that"
                f" name{_more(extra)}",
                f"{_listed('live', *sides)} must have the same names",
            )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _listed(*words: str) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _check_one(name: str, live: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> None:
    import torch

    given = {"live": live, **sources}
    for side, tensor in given.items():
        if tensor.is_neg() or tensor.is_conj():
            raise WeightsError(
                f"cannot bind `{name}`: {side} is a lazily negated view",
                "pass `tensor.resolve_neg()`",
            )
        if hasattr(tensor, "to_local"):
            raise WeightsError(
                f"cannot bind `{name}`: {side} is a DTensor",
                "pass its local shard, `tensor.to_local()`",
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            kind = (
                "on the meta device"
                if tensor.device.type == "meta"
                else f"of layout {tensor.layout}"
            )
            raise WeightsError(
                f"cannot bind `{name}`: {side} is {kind}", "pass plain dense tensors that hold data"
            )
        if not tensor.is_contiguous():
            raise WeightsError(
                f"cannot bind `{name}`: {side} is not contiguous (shape {list(tensor.shape)},"
                f" strides {list(tensor.stride())})",
                (
                    "bind the tensor that owns the memory"
                    if side == "live"
                    else "pass `tensor.contiguous()`"
                ),
            )
        if tensor.shape != live.shape:
            raise PairError(
                f"cannot bind `{name}`: {side} is {list(tensor.shape)}, live is {list(live.shape)}",
                f"{_listed('live', *sources)} must have the same shape",
            )
    if all(tensor.dtype in LIVE_DTYPES for tensor in given.values()):
        return
    if len({tensor.dtype for tensor in given.values()}) > 1:
        dtypes = ", ".join(f"{side} {tensor.dtype}" for side, tensor in given.items())
        raise PairError(
            f"cannot bind `{name}`: {dtypes}",
            "bf16, fp16 and fp32 are interpolated in any mix; every other dtype must be the same on"
            " all sides",
        )
    # by bytes, as merges compare them: torch cannot compare every dtype, such as complex32
    if "instruct" in sources and not _same_bytes(sources["base"], sources["instruct"]):
        raise DataError(
            f"`{name}` ({live.dtype}) differs between base and instruct",
            "tensors that are not bf16, fp16 or fp32 are not interpolated and must be equal on both"
            " sides",
        )


def _share(
    first: Binding, name: str, live: torch.Tensor, sources: Mapping[str, torch.Tensor]
) -> Binding:
    """Return `first` with one more name, after a check that its sources hold the same bits."""
    if live.dtype != first.live.dtype:
        raise WeightsError(
            f"`{name}` ({live.dtype}) and `{first.name}` ({first.live.dtype}) share storage with"
            " different dtypes",
            "bind one of them",
        )
    for side, known in first.sources.items():
        if not equal_bits(known, sources[side].to(known.device)):
            raise PairError(
                f"`{name}` and `{first.name}` share live storage, but their {side} tensors differ",
                "untie the live tensors before binding them",
            )
    return replace(first, names=(*first.names, name))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    a_bytes, b_bytes = (
        tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b.to(a.device))
    )
    return torch.equal(a_bytes, b_bytes)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two contiguous tensors of any shape have the same dtype and bytes."""
    import torch

    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    if a.data_ptr() == b.data_ptr() and a.device == b.device:
        return True
    x, y = as_integers(a), as_integers(b)
    # `torch.equal` compares elements: 64-bit ones take a quarter of the time of 16-bit ones
    if not any(
        z.data_ptr() % 8 or z.nbytes % 8 or z.storage_offset() * z.element_size() % 8
        for z in (x, y)
    ):
        x, y = x.view(torch.int64), y.view(torch.int64)
    return torch.equal(x, y)


def same_merge(merged: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two contiguous tensors of one dtype hold the same bits, NaN payloads aside.

    No operation promises to keep a NaN payload: the vector body and the tail of one loop may give
    NaN different bits.
    """
    if equal_bits(merged, expected):
        return True
    if (
        not expected.is_floating_point()
        or merged.dtype != expected.dtype
        or merged.numel() != expected.numel()
    ):
        return False
    nan = expected.view(-1).isnan() & merged.view(-1).isnan()
    return bool((nan | (as_integers(merged) == as_integers(expected))).all())


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a contiguous tensor as flat integers of the same width, so that NaN
    compares equal to itself."""
    import torch

    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(
        tensor.element_size()
    )
    flat = tensor.detach().view(-1)
    return flat.view(width) if width is not None else flat


NamedTensor = tuple[str, str, "torch.Tensor"]
"""(role, name, tensor); the role of live tensors is `live`."""


def first_overlap(named_tensors: Iterable[NamedTensor]) -> tuple[NamedTensor, NamedTensor] | None:
    """Return the first two tensors that share memory, the later address first, if one of them is
    live; None if there are none."""
    spans = []
    for named in named_tensors:
        tensor = named[2]
        size = tensor.numel() * tensor.element_size()
        if size:
            spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + size, named))
    reach: dict[
        tuple[str, bool], tuple[int, NamedTensor]
    ] = {}  # (device, is live) -> furthest byte so far, the tensor that it belongs to
    for device, start, stop, named in sorted(spans, key=lambda span: (*span[:3], *span[3][:2])):
        for live in (True, False) if named[0] == "live" else (True,):
            known = reach.get((device, live))
            if known is not None and start < known[0]:
                return named, known[1]
        furthest = reach.get((device, named[0] == "live"))
        if furthest is None or stop > furthest[0]:
            reach[device, named[0] == "live"] = (stop, named)
    return None


def _check_overlap(bound: Iterable[Binding]) -> None:
    """Raise WeightsError if a live tensor shares memory with another one or with a source."""
    overlap = first_overlap(
        (side, binding.name, tensor)
        for binding in bound
        for side, tensor in {"live": binding.live, **binding.sources}.items()
    )
    if overlap is not None:
        (side, name, _), (other_side, other, _) = overlap
        what = "overlaps" if other_side == side else "aliases"
        raise WeightsError(
            f"{side} tensor `{name}` {what} {other_side} tensor `{other}` in memory",
            "live tensors must own their bytes: clone the sources, or bind overlapping views once",
        )


def kept_bases(floats: Sequence[Binding], entries: Sequence[Entry]) -> list[Any]:
    """Return what live weights keep of each base tensor: the tensor where the store needs it or it
    is a memory map of a file, else a weak reference to the caller's tensor."""
    spared = [not registry.owner(entry).needs_base for entry in entries]
    maps = FileMaps() if any(spared) else None
    return [
        (
            binding.origin
            if spare and maps and binding.origin and not _is_mapped(maps, binding)
            else binding.base
        )
        for binding, spare in zip(floats, spared)
    ]


def _is_mapped(maps: FileMaps, binding: Binding) -> bool:
    return binding.base.device.type == "cpu" and maps.holds(binding.base)

"""Small pairs for deltas, what their entries stand for, and where live tensors of them are
bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pa_kernels import PackedTensor, SparseTensor

import pa_fast
from pa_fast.stores import file as delta_file
from pa_fast.stores import registry
from pa_fast.stores.lowrank import Factors
from pa_fast.stores.store import DenseEntry, Entry, Source, Store

Tensors = dict[str, torch.Tensor]

SHAPES = {"a": (65, 129), "b": (3, 40, 48), "c": (7,), "none": (0, 4), "long": (70_000,)}


def pair(
    base: torch.dtype = torch.bfloat16,
    instruct: torch.dtype | None = None,
    *,
    changed: float = 0.02,
    rel: float = 0.05,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> tuple[Tensors, Tensors]:
    """Tensors of which a share has changed. Their first weight is 0 in base and −0 in instruct."""
    g = torch.Generator().manual_seed(5)
    b = {name: torch.randn(shape, generator=g).to(base) for name, shape in shapes.items()}
    i = {}
    for name, tensor in b.items():
        moved = torch.rand(tensor.shape, generator=g) < changed
        i[name] = (tensor.float() + rel * torch.randn(tensor.shape, generator=g) * moved).to(
            instruct or base
        )
        if tensor.numel():
            b[name].view(-1)[0], i[name].view(-1)[0] = 0.0, -0.0
    return b, i


def sources(
    base: Tensors, instruct: Tensors, dtype: torch.dtype | None = None, device: str = "cpu"
) -> list[Source]:
    return [
        Source(n, b, instruct[n], dtype or instruct[n].dtype, torch.device(device))
        for n, b in base.items()
    ]


def live_like(tensors: Tensors, dtype: torch.dtype | None = None, device: str = "cpu") -> Tensors:
    return {
        name: torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
        for name, tensor in tensors.items()
    }


def end(entry: Entry, base: torch.Tensor) -> torch.Tensor:
    """The target that an entry stands for, by the plainest means."""
    if isinstance(entry, DenseEntry):
        return entry.target
    if isinstance(entry, SparseTensor):
        target = base.to(torch.promote_types(base.dtype, entry.target.dtype), copy=True)
        target.view(-1)[entry.positions()] = entry.target.to(target.dtype)
        return target
    if isinstance(entry, PackedTensor):
        everything = slice(0, entry.numel)
        steps = entry.element_codes(everything) >> 1
        target = (base.to(entry.dtype).view(-1).view(torch.int16) + steps).view(entry.dtype)
        positions, _, values = entry.exceptions(everything)
        target[positions] = values
        return target.view(base.shape)
    return (base.double() + entry.u.double() @ entry.v.double()).float()


def ends(
    store: Store, base: Tensors, instruct: Tensors
) -> tuple[Tensors, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The end of each delta, and the factors of those that are products."""
    made = dict(zip(base, store.encode(sources(base, instruct))))
    factors = {
        name: (entry.u, entry.v) for name, entry in made.items() if isinstance(entry, Factors)
    }
    return {name: end(entry, base[name]) for name, entry in made.items()}, factors


def saved(
    path: Path, base: Tensors, instruct: Tensors, store: Store, live: torch.dtype | None = None
) -> Path:
    delta_file.write(path, sources(base, instruct, live), store)
    return path


def opened(
    path: Path, base: Tensors, live: torch.dtype | None = None
) -> tuple[pa_fast.LiveWeights, Tensors]:
    w = live_like(base, live)
    return pa_fast.LiveWeights.open(w, base, path), w


def parts(entry: Entry) -> Tensors:
    """The tensors of an entry by name."""
    return registry.owner(entry).parts(entry)


def nbytes(entry: Entry) -> int:
    """Bytes of an entry."""
    return registry.owner(entry).nbytes(entry)


def count(entries: Sequence[Entry]) -> dict[str, int]:
    """How many entries there are of each kind."""
    kinds = [type(entry).__name__ for entry in entries]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

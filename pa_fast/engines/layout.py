"""Shards: the part of each of a model's tensors that lies in this process, and the check that a
pair can be merged shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pa_fast.errors import EngineError, PairError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of `tensor` in this process: the shard of a DTensor, else the tensor itself.

    It is the object that the DTensor computes with, so that assigning to its `.data` moves the
    DTensor too; `to_local` of a parameter makes a new one at each call.
    """
    shard: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer of `module`, or its shard in this process, by each of its
    names."""
    for of_kind in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in of_kind:
            yield name, local(tensor)


def distributed(module: torch.nn.Module) -> dict[str, Any]:
    """Return the DTensors among `module`'s parameters, by each of their names."""
    return {
        name: p
        for name, p in module.named_parameters(remove_duplicate=False)
        if hasattr(p, "placements")
    }


def split(module: torch.nn.Module) -> set[str]:
    """Return the names of the parameters of which this process has a shard; it has all of every
    other."""
    return {
        name
        for name, p in distributed(module).items()
        if not all(placement.is_replicate() for placement in p.placements)
    }


def check_split(base: PreTrainedModel, instruct: PreTrainedModel) -> None:
    """Check that a pair is split into equal parts in the same way on both sides.

    Raises:
        PairError: a tensor is split differently in the two models, such as a head that is tied in
            one of them.
        EngineError: nothing is split, a tensor is a partial sum, or its rows or columns do not
            divide.
    """
    theirs, ours = distributed(base), distributed(instruct)
    for name in sorted(theirs.keys() | ours.keys()):
        b, i = (
            None if side.get(name) is None else (side[name].placements, side[name].device_mesh)
            for side in (theirs, ours)
        )
        if b != i:
            raise PairError(
                f"`{name}` is {_spelled(b)} in the base model and {_spelled(i)} in the instruct"
                " model",
                "a head that is tied on one side only is split on that side only: load such a pair"
                " on one device",
            )
    if not split(instruct):
        raise no_plan(type(instruct).__name__)
    for name, tensor in ours.items():
        _check_even(name, tensor)


def no_plan(kind: str) -> EngineError:
    """Return the error for a model class that transformers cannot split."""
    return EngineError(
        f"transformers splits no weight of {kind}: it has no tensor-parallel plan for it",
        "use the transformers engine: every rank would hold the whole model",
    )


def _check_even(name: str, tensor: Any) -> None:
    for ranks, placement in zip(tensor.device_mesh.shape, tensor.placements):
        if placement.is_partial():
            raise EngineError(
                f"`{name}` is a partial sum on each rank, which cannot be interpolated",
                "use a plan that splits weights by rows or columns",
            )
        pieces = ranks * getattr(placement, "split_factor", 1)
        if not placement.is_replicate() and tensor.shape[placement.dim] % pieces:
            raise EngineError(
                f"`{name}` {list(tensor.shape)} does not split into {pieces} equal parts along"
                f" dimension {placement.dim}",
                f"start another number of ranks than {ranks}",
            )


def _spelled(layout: Any) -> str:
    return "whole on every rank" if layout is None else f"split as {', '.join(map(str, layout[0]))}"

"""Switches of one synthetic pair with every store, proven, then timed in turn with dense ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from pa_kernels import LowRank, Sparse, SparseTensor, reference
from torch import Tensor

from pa_fast.errors import WeightsError
from pa_fast.live.weights import LiveWeights
from pa_fast.throughput import Timing
from pa_fast.throughput.turns import seconds, wait

PARTIAL = 0.017
"""The pair of which sparse and low-rank deltas are timed too: what they move does not depend on its
size."""

DENSITY, RANK = 0.02, 64

_SAMPLE = 4096

_REPORT = (
    "run the tests (`make test`, on a GPU `make gpu`): this is a fault of pa_fast, or of the"
    " machine"
)

Tensors = Mapping[str, Tensor]


def switches(
    live: Tensors,
    base: Tensors,
    relative: float,
    rounds: int,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Iterator[Timing]:
    """Dense twice and packed, in turn; of the pair PARTIAL also sparse and low-rank, in turn with
    one another.

    Raises:
        WeightsError: a switch wrote other bits than the contract's: no speed of it is given.
    """
    progress(f"a pair with a delta of {relative:.2%}")
    instruct = {name: _near(tensor, relative, generator) for name, tensor in base.items()}
    count, live_bytes = (
        sum(tensor.numel() for tensor in live.values()),
        sum(tensor.nbytes for tensor in live.values()),
    )
    began = time.perf_counter()
    packed = LiveWeights.bind(live, base, instruct, "packed")
    wait()
    encoding = time.perf_counter() - began
    progress(f"switches of a delta of {relative:.2%}")
    with packed, LiveWeights.bind(live, base, instruct, "dense") as dense:
        held, kept = packed.memory(), dense.memory()
        # all go to the same λ in a round: packed first, which has to find what it left, by whomever
        # that was written again
        stores = {"packed": packed, "dense": dense, "dense, again": dense}
        took = seconds({what: _walk(weights) for what, weights in stores.items()}, rounds)
        for what, weights in stores.items():
            weights.set_lambda(0.3)
            weights.verify()
            prove(what, live, lambda name, at: _lerp(base[name], instruct[name], at))
    for what in ("dense", "dense, again"):
        yield Timing(what, relative, kept.total_bytes / count, 3 * live_bytes, took[what], rounds)
    moved = held.live_bytes + held.total_bytes
    yield Timing(
        "packed", relative, held.total_bytes / count, moved, took["packed"], rounds, encoding
    )
    if relative == PARTIAL:
        yield from _partial(live, base, instruct, rounds, generator)


def _partial(
    live: Tensors, base: Tensors, instruct: Tensors, rounds: int, generator: torch.Generator
) -> Iterator[Timing]:
    """A sparse delta of random places, and low-rank factors of every matrix beside whole
    vectors."""
    names = list(live)
    count = sum(tensor.numel() for tensor in live.values())
    entries, ends = [], {}
    for name in names:
        b, i = base[name].view(-1), instruct[name].view(-1)
        places = torch.rand(b.shape, device=b.device, generator=generator) < DENSITY
        entries.append(SparseTensor.encode(places, b[places], i[places], b.numel()))
        ends[name] = torch.where(places, i, b)
        live[name].copy_(base[name])
    sparse = Sparse([live[name] for name in names], entries)
    sparse.run_(0.3)
    prove("sparse", live, lambda name, at: _lerp(base[name], ends[name], at))
    took = seconds({"sparse": sparse.launch_, "sparse, again": sparse.launch_}, rounds)
    held, chosen = sum(entry.nbytes for entry in entries), sum(entry.count for entry in entries)
    for what in took:
        said = what.replace("sparse", f"sparse, {DENSITY:.0%} of the weights")
        yield Timing(said, PARTIAL, 2 + held / count, held + 2 * chosen, took[what], rounds)
    matrices = [name for name in names if live[name].dim() == 2]
    if not matrices:
        return
    out, kept = [live[name] for name in matrices], [base[name] for name in matrices]
    u = [b.new_empty(b.shape[0], RANK).normal_(0, 0.02, generator=generator) for b in kept]
    v = [b.new_empty(RANK, b.shape[1]).normal_(0, 0.02, generator=generator) for b in kept]
    merge = LowRank(out, kept, u, v)
    merge.run_(0.3)
    _near_enough(out[0], reference.lowrank(kept[0][:64].cpu(), u[0][:64].cpu(), v[0].cpu(), 0.3))
    took = seconds({"low rank": merge.launch_, "low rank, again": merge.launch_}, rounds)
    weights, factors = sum(w.numel() for w in out), sum(x.nbytes for x in (*u, *v))
    for what in took:
        said = what.replace("low rank", f"low rank {RANK}, its matrices")
        yield Timing(
            said, PARTIAL, 4 + factors / weights, 4 * weights + factors, took[what], rounds
        )


def prove(what: str, live: Tensors, expected: Callable[[str, slice], Tensor]) -> None:
    """Compare the first and the last elements of every live tensor with `expected(name, slice)` of
    the flat one.

    Raises:
        WeightsError: they differ.
    """
    for name, tensor in live.items():
        for at in (
            slice(0, min(_SAMPLE, tensor.numel())),
            slice(max(tensor.numel() - _SAMPLE, 0), tensor.numel()),
        ):
            if not bool(reference.same_bits(tensor.view(-1)[at].cpu(), expected(name, at)).all()):
                raise WeightsError(
                    f"{what}: tensor {name} does not hold the merge at λ = 0.3, so no speed of it"
                    " is given",
                    _REPORT,
                )


def _near_enough(live: Tensor, expected: Tensor) -> None:
    found = live[: expected.shape[0]].cpu().float()
    if not bool(((found - expected.float()).abs() <= 2**-7 * expected.float().abs() + 1e-3).all()):
        raise WeightsError(
            "low rank: rows differ from the reference by more than 2⁻⁷ of it, so no speed is given",
            _REPORT,
        )


def _walk(weights: LiveWeights) -> Callable[[], None]:
    """Goes to another λ at every call, always in the same order."""
    lams = itertools.cycle(k / 256 for k in range(1, 256))
    return lambda: weights.set_lambda(next(lams))


def _lerp(base: Tensor, instruct: Tensor, at: slice) -> Tensor:
    return reference.lerp(base.view(-1)[at].cpu(), instruct.view(-1)[at].cpu(), 0.3)


def _near(base: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    step = torch.empty(base.shape, dtype=torch.float32, device=base.device).normal_(
        0, 0.02 * relative, generator=generator
    )
    return step.add_(base).bfloat16()

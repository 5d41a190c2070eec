"""Switches of one synthetic pair with every store, first checked, then timed in turn with dense
ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from pa_kernels import LowRank, Sparse, SparseTensor, reference
from torch import Tensor

from pa_fast.live.weights import LiveWeights
from pa_fast.throughput.harness import Table, Way, check_bits, require_bits, timed, wait

PARTIAL = 0.017
"""The pair of which sparse and low-rank deltas are timed too: what they move does not depend on its
size."""

DENSITY, RANK, LAM = 0.02, 64, 0.3

Tensors = Mapping[str, Tensor]


def switches(
    live: Tensors,
    base: Tensors,
    relative: float,
    rounds: int,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> tuple[Table, float]:
    """Time dense twice and packed, in turn; of the pair PARTIAL also sparse and low-rank, each
    twice. Return them, and the seconds that packed encoding took.

    Raises:
        WrongBits: a switch wrote other bits than the contract's.
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
    encode_s = time.perf_counter() - began
    progress(f"switches of a delta of {relative:.2%}")
    with packed, LiveWeights.bind(live, base, instruct, "dense") as dense:
        for what, weights in (("packed", packed), ("dense", dense)):
            weights.set_lambda(LAM)
            weights.verify()
            _check(what, live, base, instruct)
        held, kept = packed.memory().total_bytes, dense.memory().total_bytes
        codes = Way("packed", _walk(packed), 1, live_bytes + held, held / count)
        whole = Way("dense", _walk(dense), 1, 3 * live_bytes, kept / count)
        # all go to the same λ in a round: packed first, which has to find what it left, by whomever
        # that was written again
        ways = [codes, whole, replace(whole.repeated, work=_walk(dense))]
        first, *others = timed(ways, rounds, turn=False).values()
    rows = [*others, first]
    if relative == PARTIAL:
        rows += _sparse(live, base, instruct, rounds, generator)
        rows += _lowrank(live, base, rounds, generator)
    return Table("", f"delta of {relative:.2%}", tuple(rows), "dense"), encode_s


def _sparse(
    live: Tensors, base: Tensors, instruct: Tensors, rounds: int, generator: torch.Generator
) -> Iterable[Way]:
    """Time a sparse delta at random positions."""
    entries, targets = [], {}
    for name, tensor in live.items():
        b, i = base[name].view(-1), instruct[name].view(-1)
        mask = torch.rand(b.shape, device=b.device, generator=generator) < DENSITY
        entries.append(SparseTensor.encode(mask, b[mask], i[mask], b.numel()))
        targets[name] = torch.where(mask, i, b)
        tensor.copy_(base[name])
    switch = Sparse(list(live.values()), entries)
    switch.run_(LAM)
    _check("sparse", live, base, targets)
    held, chosen = sum(entry.nbytes for entry in entries), sum(entry.count for entry in entries)
    way = Way(
        f"sparse, {DENSITY:.0%} of the weights",
        switch.launch_,
        moved_bytes=held + 2 * chosen,
        bytes_per_weight=2 + held / sum(tensor.numel() for tensor in live.values()),
    )
    return timed([way, way.repeated], rounds).values()


def _lowrank(
    live: Tensors, base: Tensors, rounds: int, generator: torch.Generator
) -> Iterable[Way]:
    """Time low-rank factors of every matrix; a model without matrices has none."""
    matrices = [name for name in live if live[name].dim() == 2]
    if not matrices:
        return []
    out, kept = [live[name] for name in matrices], [base[name] for name in matrices]
    u = [b.new_empty(b.shape[0], RANK).normal_(0, 0.02, generator=generator) for b in kept]
    v = [b.new_empty(RANK, b.shape[1]).normal_(0, 0.02, generator=generator) for b in kept]
    merge = LowRank(out, kept, u, v)
    merge.run_(LAM)
    wanted = reference.lowrank(kept[0][:64].cpu(), u[0][:64].cpu(), v[0].cpu(), LAM).float()
    error = (out[0][:64].cpu().float() - wanted).abs()
    require_bits(bool((error <= 2**-7 * wanted.abs() + 1e-3).all()), "low rank")
    weights, factors = sum(w.numel() for w in out), sum(x.nbytes for x in (*u, *v))
    way = Way(
        f"low rank {RANK}, its matrices",
        merge.launch_,
        moved_bytes=4 * weights + factors,
        bytes_per_weight=4 + factors / weights,
    )
    return timed([way, way.repeated], rounds).values()


def _check(what: str, live: Tensors, base: Tensors, instruct: Tensors) -> None:
    """Raise WrongBits unless `live` holds W(LAM) of tensors of the same names."""
    sides = [(base[name].view(-1), instruct[name].view(-1)) for name in live]

    def expected(t: int, span: slice) -> Tensor:
        b, i = sides[t]
        return reference.lerp(b[span].cpu(), i[span].cpu(), LAM)

    check_bits(what, list(live.values()), expected)


def _walk(weights: LiveWeights) -> Callable[[], None]:
    """Return a function that sets another λ at each call, always in the same order."""
    lams = itertools.cycle(k / 256 for k in range(1, 256))
    return lambda: weights.set_lambda(next(lams))


def _near(base: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    step = torch.empty(base.shape, dtype=torch.float32, device=base.device).normal_(
        0, 0.02 * relative, generator=generator
    )
    return step.add_(base).bfloat16()

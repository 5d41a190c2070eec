"""A switch of each store against the dense one, as the delta grows: sparse by density, low rank by rank. Interleaved medians.

The bits of every contender are compared with the reference on a piece before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pa_kernels import Lerp, LowRank, Sparse, SparseTensor, reference

SHAPE, COUNT, ROUNDS = (2048, 5632), 8, 7
DENSITIES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2)
RANKS = (16, 64, 256)


def test_deltas(benchmark: Any, capsys: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).bfloat16()

    base = [drawn(*SHAPE) for _ in range(COUNT)]
    instruct = [(b + drawn(*SHAPE, scale=4e-4)).contiguous() for b in base]
    live = [b.clone() for b in base]
    contenders: dict[str, Callable[[float], None]] = {"dense": Lerp(live, base, instruct).run_}
    weights = sum(b.numel() for b in base)
    sizes = {"dense": 4.0}
    for density in DENSITIES:
        entries = []
        for b, i in zip(base, instruct):
            mask = torch.rand(b.numel(), generator=generator) < density
            entries.append(SparseTensor.encode(mask, b.view(-1)[mask], i.view(-1)[mask], b.numel()))
        contenders[f"sparse {density:g}"] = Sparse(live, entries).run_
        sizes[f"sparse {density:g}"] = sum(entry.nbytes for entry in entries) / weights
    for rank in RANKS:
        factors = [(drawn(SHAPE[0], rank), drawn(rank, SHAPE[1])) for _ in range(COUNT)]
        merging = LowRank(live, base, [u for u, _ in factors], [v for _, v in factors])
        merging.run_(0.3)
        rows = slice(0, 64)
        expected = reference.lowrank(base[0][rows], factors[0][0][rows], factors[0][1], 0.3)
        steps = (live[0][rows].view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        assert float((steps > 1).float().mean()) < 1e-4, "wrong bits: no speed is printed"
        contenders[f"low rank {rank}"] = merging.run_
        sizes[f"low rank {rank}"] = 2 + sum(u.nbytes + v.nbytes for u, v in factors) / weights
    contenders["dense"](0.3)
    assert torch.equal(live[0], torch.lerp(base[0], instruct[0], 0.3)), "wrong bits: no speed is printed"
    contenders["dense again"] = contenders["dense"]
    sizes["dense again"] = 4.0
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(0.1 + 0.1 * round_)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    with capsys.disabled():
        print(f"\n{weights / 1e6:.0f} M bf16 weights, {torch.get_num_threads()} threads, torch {torch.__version__}:")
        print("  store             ms per switch   dense / it   bytes per weight beside the live copy")
        for name, value in medians.items():
            print(f"  {name:16} {value * 1e3:10.1f} {medians['dense'] / value:12.2f} {sizes[name]:14.3f}")
    benchmark.extra_info |= medians
    benchmark.pedantic(contenders["dense"], args=(0.3,), rounds=ROUNDS)

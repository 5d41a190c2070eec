"""The CPU switch (P5) and the checksum pass, against what torch does with the same bytes in one flat piece."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pa_kernels import Lerp, checksum, reference

LAYERS = 10
LAYER = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (5504, 2048), (5504, 2048), (2048, 5504), (2048,), (2048,)]
"""Ten layers of a 1B model's shapes: 0.44 G weights, so 2.7 GB move in a switch."""

ROUNDS = 7


def interleaved(**contenders: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each, run in turn so that whatever disturbs the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@pytest.fixture(scope="module")
def weights() -> tuple[list[int], list[torch.Tensor]]:
    sizes = [int(torch.Size(shape).numel()) for shape in LAYER] * LAYERS
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(sum(sizes), generator=generator).mul_(0.02)
    i = b + torch.randn(sum(sizes), generator=generator).mul_(0.0004)
    return sizes, [
        b.bfloat16(),
        i.bfloat16(),
        torch.zeros(sum(sizes), dtype=torch.bfloat16),
        torch.zeros(sum(sizes), dtype=torch.bfloat16),
    ]


def report(capsys: Any, line: str) -> None:
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    with capsys.disabled():
        print(f"\n{line} [{machine}, torch {torch.__version__}]")


def test_switch_against_one_flat_lerp(benchmark: Any, capsys: Any, weights: tuple[list[int], list[torch.Tensor]]) -> None:
    sizes, (b, i, flat, live) = weights
    lerp = Lerp(list(live.split(sizes)), list(b.split(sizes)), list(i.split(sizes)))
    lerp.run_(0.3)
    sample = slice(0, 1_000_000)
    assert torch.equal(live[sample].view(torch.int16), reference.lerp(b[sample], i[sample], 0.3).view(torch.int16)), "wrong bits"
    medians = interleaved(
        flat=lambda: torch.lerp(b, i, 0.3, out=flat),
        ours=lambda: lerp.run_(0.3),
        flat_again=lambda: torch.lerp(b, i, 0.3, out=flat),
    )
    assert torch.equal(live.view(torch.int16), flat.view(torch.int16)), "wrong bits"
    moved = 6 * b.numel()
    ratio, noise = medians["flat"] / medians["ours"], medians["flat"] / medians["flat_again"]
    benchmark.extra_info |= {"bytes": moved, "speed_of_flat": ratio, "same_version_twice": noise}
    report(
        capsys,
        f"P5: switch of {len(sizes)} tensors {moved / medians['ours'] / 1e9:.2f} GB/s, {ratio:.3f} of one flat torch.lerp(out=) "
        f"at {moved / medians['flat'] / 1e9:.2f} GB/s (the same version twice: {noise:.3f})",
    )
    benchmark.pedantic(lerp.run_, args=(0.3,), rounds=ROUNDS)


def test_checksum_against_one_flat_sum(benchmark: Any, capsys: Any, weights: tuple[list[int], list[torch.Tensor]]) -> None:
    sizes, (b, *_) = weights
    tensors = list(b.split(sizes))
    assert checksum(tensors[1:2]) == [reference.checksum(tensors[1])], "wrong sum"
    words = b.view(torch.int64)
    medians = interleaved(sum=words.sum, ours=lambda: checksum(tensors), sum_again=words.sum)
    moved = 2 * b.numel()
    benchmark.extra_info |= {"bytes": moved, "speed_of_sum": medians["sum"] / medians["ours"]}
    report(
        capsys,
        f"checksum {moved / medians['ours'] / 1e9:.2f} GB/s, int64 sum of the same words {moved / medians['sum'] / 1e9:.2f} GB/s "
        f"(the same version twice: {medians['sum'] / medians['sum_again']:.3f})",
    )
    benchmark.pedantic(checksum, args=(tensors,), rounds=ROUNDS)

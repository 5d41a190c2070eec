"""The low-rank merge on a GPU: matrix units' sums on arbitrary data, graphs, host memory, 64-bit
offsets, a sanitizer."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from pa_kernels import LowRank, lowrank_merge_, reference, truncated_svd

from tests.kernels.pairs import INTERPRETED, bits, sampled
from tests.kernels.products import KINDS, exact_matrix, matrix, near, ulps

pytestmark = pytest.mark.gpu


def sized(on_gpu: Any, interpreted: Any) -> Any:
    """A shape or rank for a GPU, or the smaller one for Triton's interpreter."""
    return interpreted if INTERPRETED else on_gpu


ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(("out", "base", "factor"), sampled(KINDS, 9), ids=str)
def test_every_dtype(out: torch.dtype, base: torch.dtype, factor: torch.dtype) -> None:
    entries = [
        matrix(sized((700, 1040), (70, 144)), sized(256, 40), base, factor),
        matrix(sized((3, 130, 257), (2, 66, 129)), 40, base, factor),
        matrix((64, 128), 16, base, factor),
    ]
    live = [torch.empty(b.shape, dtype=out, device="cuda") for b, _, _ in entries]
    merge = LowRank(live, *zip(*([x.cuda() for x in entry] for entry in entries)))
    for lam in sized((-2.3, 0.05, 0.3, 1.0, 0.0), (-2.3, 0.3, 0.0)):
        merge.run_(lam)
        assert all(near(w, entry, lam) for w, entry in zip(live, entries)), lam


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_bits_of_the_reference_where_sums_are_exact(dtype: torch.dtype) -> None:
    entry = exact_matrix(sized((300, 528), (70, 144)), sized(96, 40), dtype, dtype)
    w = torch.empty(entry[0].shape, dtype=dtype, device="cuda")
    merge = LowRank([w], *([x.cuda()] for x in entry))
    for step in (0, 77, 256, -40):
        merge.run_(step / 256)
        assert torch.equal(bits(w), bits(reference.lowrank(*entry, step / 256))), step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [16, 64, 256])
def test_within_one_ulp_where_nothing_cancels(dtype: torch.dtype, rank: int) -> None:
    b, u, v = matrix(sized((512, 1024), (64, 128)), rank, dtype, dtype)
    u = (u.float() * 0.01).to(dtype)
    b = (b.float() + torch.copysign(torch.full_like(b, 0.01, dtype=torch.float32), b.float())).to(
        dtype
    )
    w = torch.empty(b.shape, dtype=dtype, device="cuda")
    for lam in (0.3, -1.0, 2.0):
        lowrank_merge_([w], [b.cuda()], [u.cuda()], [v.cuda()], lam)
        apart = ulps(w, reference.lowrank(b, u, v, lam))
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) < 1e-3


@pytest.mark.gpu(only="matrix units")
def test_a_process_that_allows_tf32_changes_nothing() -> None:
    entry = matrix((256, 384), 64, torch.float32, torch.float32)
    w = torch.empty(entry[0].shape, device="cuda")
    merge = LowRank([w], *([x.cuda()] for x in entry))
    merge.run_(0.3)
    expected = w.clone()
    torch.set_float32_matmul_precision("high")
    try:
        merge.run_(0.3)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(bits(w), bits(expected))


@pytest.mark.gpu(only="pinned host memory")
def test_a_base_in_pinned_host_memory_is_read_where_it_lies() -> None:
    b, u, v = matrix((300, 528), 32, torch.bfloat16, torch.bfloat16)
    device, host = (torch.empty(b.shape, dtype=b.dtype, device="cuda") for _ in range(2))
    lowrank_merge_([device], [b.cuda()], [u.cuda()], [v.cuda()], 0.3)
    lowrank_merge_([host], [b.pin_memory()], [u.cuda()], [v.cuda()], 0.3)
    assert torch.equal(bits(device), bits(host))
    with pytest.raises(ValueError, match="entry 0: base is on cpu, the live tensor on cuda"):
        lowrank_merge_([host], [b], [u.cuda()], [v.cuda()], 0.3)


@pytest.mark.gpu(only="CUDA graphs")
def test_a_graph_replays_whatever_lambda_the_table_holds() -> None:
    b, u, v = matrix((130, 272), 48, torch.bfloat16, torch.bfloat16)
    w, eager = (torch.zeros(b.shape, dtype=b.dtype, device="cuda") for _ in range(2))
    sources = [b.cuda()], [u.cuda()], [v.cuda()]
    merge, plain = LowRank([w], *sources), LowRank([eager], *sources)
    merge.run_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge.launch_()
    for lam in (0.3, 0.0, 1.0, -0.2):
        merge.groups[0].lams.fill_(lam)
        graph.replay()
        plain.run_(lam)
        assert torch.equal(bits(w), bits(eager)), lam


def test_no_history_and_rows_aside() -> None:
    entries = [
        matrix(sized((1000, 2064), (200, 144)), sized(64, 40), torch.bfloat16, torch.bfloat16),
        matrix(sized((5, 300, 48), (2, 100, 48)), 16, torch.bfloat16, torch.bfloat16),
    ]
    live = [torch.empty(b.shape, dtype=b.dtype, device="cuda") for b, _, _ in entries]
    merge = LowRank(live, *zip(*([x.cuda() for x in entry] for entry in entries)))
    merge.run_(0.3)
    first = [w.clone() for w in live]
    for lam in sized((1.5, -0.2, 0.0, 0.3), (1.5, 0.3)):
        merge.run_(lam)
    for t, (w, before) in enumerate(zip(live, first)):
        assert torch.equal(bits(w), bits(before))
        stacked = w.view(-1, w.shape[-1])
        for start in range(0, stacked.shape[0], 190):
            rows = slice(start, min(start + 190, stacked.shape[0]))
            assert torch.equal(bits(merge.merged(t, rows, 0.3)), bits(stacked[rows])), (t, rows)


@pytest.mark.gpu(only="more than 2³¹ elements")
def test_more_than_two_to_the_31_elements() -> None:
    shape = (70_000, 32_768)
    if torch.cuda.mem_get_info()[0] < 4 * shape[0] * shape[1] + 2**30:
        pytest.skip("needs 11 GB of free device memory")
    b = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    u = torch.randn(shape[0], 16, device="cuda").bfloat16()
    v = torch.randn(16, shape[1], device="cuda").mul_(0.01).bfloat16()
    w = torch.empty_like(b)
    lowrank_merge_([w], [b], [u], [v], 0.3)
    for rows in (slice(0, 64), slice(65_500, 65_600), slice(shape[0] - 64, shape[0])):
        assert near(w[rows], (b[rows].cpu(), u[rows].cpu(), v.cpu()), 0.3), rows


def test_the_svd_of_a_gpu_is_the_svd_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(400, 700, generator=generator) * 0.02).bfloat16()
    inst = (base.float() + torch.randn(400, 700, generator=generator) * 1e-3).bfloat16()
    here, there = truncated_svd(base, inst, 32), truncated_svd(base.cuda(), inst.cuda(), 32)
    assert torch.allclose(here.s, there.s.cpu(), rtol=1e-3)
    assert here.energy == pytest.approx(there.energy, rel=1e-6)
    assert here.relative_error == pytest.approx(there.relative_error, rel=1e-3)


SANITIZED = """
import torch
from pa_kernels import LowRank
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    tensors = [[], [], [], []]
    for shape, rank, skip in (
        ((64, 128), 16, 0), ((70, 272), 40, 0), ((2, 66, 16), 3, 0),
        ((5, 7), 2, 0), ((64, 128), 16, 1),
    ):
        u, v = (*shape[:-1], rank), (*shape[:-2], rank, shape[-1])
        for kind, size in zip(tensors, (shape, shape, u, v)):
            count = torch.Size(size).numel()
            kind.append(torch.randn(count + skip, device="cuda").to(dtype)[skip:].view(size))
    merge = LowRank(*tensors)
    for lam in (0.0, 0.3, -1.5):
        merge.run_(lam)
    merge.merged(1, slice(60, 70), 0.3)
torch.cuda.synchronize()
"""


@pytest.mark.gpu(only="compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        cwd=ROOT / "kernels",
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

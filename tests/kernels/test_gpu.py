"""What only a GPU can show: real rounding on arbitrary data, graphs, 64-bit offsets, and accesses
that a sanitizer watches."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from pa_kernels import (
    Lerp,
    Packed,
    PackedTensor,
    Sparse,
    SparseTensor,
    checksum,
    lerp_,
    reference,
    sparse_set_,
)
from pa_kernels.reference import DRAW_STEP, Draw
from pa_kernels.switch import TritonGroup

from bench.gpu.tools import sanitized
from tests.kernels.pairs import (
    INTERPRETED,
    LAMBDAS,
    TRIPLES,
    bits,
    elements,
    pair,
    same,
    sampled,
    sparse,
    sparsely_set,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", reference.LIVE_DTYPES, ids=str)
def test_equals_torch_lerp_and_the_reference(dtype: torch.dtype) -> None:
    b, i = pair(elements(4_000_003), dtype, dtype)
    device_b, device_i = b.cuda(), i.cuda()
    w = torch.empty_like(device_b)
    lerp = Lerp([w], [device_b], [device_i])
    for lam in LAMBDAS:
        lerp.run_(lam)
        assert torch.equal(bits(w), bits(reference.lerp(b, i, lam))), lam
        negative_zero = (device_b == 0) & device_b.signbit() | (device_i == 0) & device_i.signbit()
        assert torch.equal(
            w[~negative_zero], torch.lerp(device_b, device_i, lam)[~negative_zero]
        ), lam


def test_one_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last element, as a kernel that forgets a lane, or rounds it otherwise, leaves it."""
    launch_ = TritonGroup.launch_

    def wrong_(self: TritonGroup[Any]) -> None:
        launch_(self)
        for row in self.rows:
            row.out.view(-1)[-1:].view(torch.int16).bitwise_xor_(1)

    monkeypatch.setattr(TritonGroup, "launch_", wrong_)
    with pytest.raises(AssertionError):
        test_equals_torch_lerp_and_the_reference(torch.bfloat16)
    with pytest.raises(AssertionError):
        test_misaligned_tensors(1)
    with pytest.raises(AssertionError):
        test_sparse_of_misaligned_tensors(1)


def test_an_fma_rounds_once() -> None:
    """A product and a sum in fp64, rounded to fp32 after each other, give another result here."""
    b, i = torch.tensor([1.0] * 2048), torch.tensor([1.3612505197525024] * 2048)
    w, lam = torch.empty(2048, device="cuda"), 0.005587236490100622
    lerp_([w], [b.cuda()], [i.cuda()], lam)
    twice = (b.double() + (i - b).double() * torch.tensor(lam).float().double()).float()
    assert torch.equal(bits(w), bits(reference.lerp(b, i, lam)))
    assert not torch.equal(bits(w), bits(twice))


@pytest.mark.parametrize(("out", "base", "inst"), sampled(TRIPLES, 9), ids=str)
def test_every_dtype_triple(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    b, i = pair(elements(500_001), base, inst)
    w = torch.empty(b.shape, dtype=out, device="cuda")
    for lam in (0.0, 0.05, 0.6, 1.0, 1.5, -0.2):
        lerp_([w], [b.cuda()], [i.cuda()], lam)
        assert same(w, reference.lerp(b, i, lam, out)), lam


@pytest.mark.parametrize(("skip",), sampled([(k,) for k in (1, 2, 3, 4, 8, 5, 6, 7, 0)], 4))
def test_misaligned_tensors(skip: int) -> None:
    b, i = pair(2_100 if INTERPRETED else 40_000, torch.bfloat16, torch.bfloat16)
    for skips in ((skip, 0, 0), (0, skip, 0), (0, 0, skip), (skip, skip, skip)):
        out, base, inst = (
            torch.zeros(b.numel() + s, dtype=torch.bfloat16, device="cuda")[s:] for s in skips
        )
        base.copy_(b)
        inst.copy_(i)
        lerp_([out], [base], [inst], 0.3)
        assert torch.equal(bits(out), bits(reference.lerp(b, i, 0.3)))
    assert checksum([base]) == [reference.checksum(b)]


def test_many_tensors_are_one_launch_and_no_history() -> None:
    sizes = [elements(4096 * 64), 4096, 1000, 0, 33, 2048] * (2 if INTERPRETED else 20)
    sources = [pair(size, torch.bfloat16, torch.bfloat16, seed) for seed, size in enumerate(sizes)]
    live = [torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
    lerp = Lerp(live, [b.cuda() for b, _ in sources], [i.cuda() for _, i in sources])
    assert len(lerp.groups) == 1
    for lam in (0.3, 1.5, -0.2, 0.7, 0.05)[:: 2 if INTERPRETED else 1]:
        lerp.run_(lam)
    for w, (b, i) in zip(live, sources):
        assert torch.equal(bits(w), bits(reference.lerp(b, i, 0.05)))
    assert checksum(live) == [reference.checksum(w) for w in live]


@pytest.mark.gpu(only="CUDA graphs")
def test_a_graph_replays_whatever_lambda_the_table_holds() -> None:
    b, i = pair(100_003, torch.bfloat16, torch.bfloat16)
    w = torch.zeros(b.shape, dtype=b.dtype, device="cuda")
    lerp = Lerp([w], [b.cuda()], [i.cuda()])
    lerp.run_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lerp.launch_()
    for lam in (0.3, 0.0, 1.0, -0.2):
        lerp.groups[0].lams.fill_(lam)
        graph.replay()
        assert torch.equal(bits(w), bits(reference.lerp(b, i, lam))), lam


@pytest.mark.parametrize(
    ("out", "base", "inst"),
    sampled([t for t in TRIPLES if t[0] != torch.float32], 9),
    ids=str,
)
def test_stochastic_rounding(out: torch.dtype, base: torch.dtype, inst: torch.dtype) -> None:
    b, i = pair(elements(500_001), base, inst)
    w = torch.empty(b.shape, dtype=out, device="cuda")
    for draw in (Draw(77), Draw(2**32 - 1, 2**32 - DRAW_STEP)):
        # where the noise starts and how λ branches have nothing to do with each other
        some = INTERPRETED and draw.start > 0
        for lam in (0.05, 0.6) if some else (0.0, 0.05, 0.6, 1.0, 1.5, -0.2):
            lerp_([w], [b.cuda()], [i.cuda()], lam, draws=[draw])
            assert same(w, reference.lerp(b, i, lam, out, draw=draw)), lam


@pytest.mark.gpu(only="CUDA graphs")
def test_a_graph_replays_stochastic_rounding() -> None:
    b, i = pair(100_003, torch.bfloat16, torch.bfloat16)
    w = torch.zeros(b.shape, dtype=b.dtype, device="cuda")
    lerp = Lerp([w], [b.cuda()], [i.cuda()], draws=[Draw(77)])
    lerp.run_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lerp.launch_()
    for lam in (0.3, 0.0, 1.0, 0.3):
        lerp.groups[0].lams.fill_(lam)
        graph.replay()
        assert torch.equal(bits(w), bits(reference.lerp(b, i, lam, draw=Draw(77)))), lam


@pytest.mark.gpu(only="more than 2³¹ elements")
def test_more_than_two_to_the_31_elements() -> None:
    size = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * size + 2**30:
        pytest.skip("needs 14 GB of free device memory")
    pattern_b, pattern_i = (x.cuda() for x in pair(1_000_003, torch.bfloat16, torch.bfloat16))
    b, i, w = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    for at in range(0, size, pattern_b.numel()):
        length = min(pattern_b.numel(), size - at)
        b[at : at + length], i[at : at + length] = pattern_b[:length], pattern_i[:length]
    expected = reference.lerp(pattern_b.cpu(), pattern_i.cpu(), 0.3).cuda()
    lerp_([w], [b], [i], 0.3)
    kind = torch.int16
    for at in range(0, size, pattern_b.numel()):
        length = min(pattern_b.numel(), size - at)
        assert torch.equal(w[at : at + length].view(kind), expected[:length].view(kind)), at
    del b, i
    (found,) = checksum([w])
    assert [found] == checksum([w.cpu()])


def to_device(entry: SparseTensor) -> SparseTensor:
    return replace(
        entry,
        **{name: getattr(entry, name).cuda() for name in ("where", "starts", "base", "target")},
    )


@pytest.mark.parametrize("kind", ["index", "bitmap"])
@pytest.mark.parametrize(("out", "base", "inst"), sampled(TRIPLES, 9), ids=str)
def test_sparse_of_every_dtype_triple(
    out: torch.dtype, base: torch.dtype, inst: torch.dtype, kind: str
) -> None:
    # of a bitmap several tiles, of an index list several blocks of one
    several = (4 << 16, 0.3)
    if INTERPRETED:
        several = (3 << 12, 0.3) if kind == "bitmap" else (1 << 16, 0.02)
    entries = [
        sparse(size, base, inst, p, kind, seed=size)
        for size, p in ((0, 0.1), (5, 1.0), (elements(1_000_003), 0.01), several)
    ]
    live = [torch.randn(entry.numel).to(out) for entry in entries]
    on_device = [w.cuda() for w in live]
    prepared = Sparse(on_device, [to_device(entry) for entry in entries])
    assert len(prepared.groups) == 1
    for lam in LAMBDAS[:: 7 if INTERPRETED else 1]:
        prepared.run_(lam)
        for found, w, entry in zip(on_device, live, entries):
            assert same(found, sparsely_set(w, entry, lam)), (lam, entry.numel)


@pytest.mark.parametrize(("skip",), sampled([(k,) for k in (1, 2, 8, 4, 0, 7)], 2))
def test_sparse_of_misaligned_tensors(skip: int) -> None:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.zeros(tensor.numel() + skip, dtype=tensor.dtype, device="cuda")
        storage[skip:] = tensor.cuda()
        return storage[skip:]

    size = elements(300_000)
    for kind in ("index", "bitmap"):
        entry = sparse(size, torch.bfloat16, torch.bfloat16, 0.02, kind)
        for names in (
            ("where",),
            ("starts",),
            ("base",),
            ("target",),
            ("where", "starts", "base", "target"),
        ):
            there = replace(
                to_device(entry), **{name: moved(getattr(entry, name)) for name in names}
            )
            w = moved(torch.ones(size, dtype=torch.bfloat16))
            sparse_set_([w], [there], 0.3)
            assert torch.equal(
                bits(w), bits(sparsely_set(torch.ones(size, dtype=torch.bfloat16), entry, 0.3))
            ), names


@pytest.mark.parametrize("kind", ["index", "bitmap"])
def test_sparse_is_encoded_and_checked_on_the_device(kind: str) -> None:
    mask = torch.rand(3_000_001) < 0.02
    values = torch.randn(int(mask.sum())).bfloat16()
    here = SparseTensor.encode(mask, values, values, mask.numel(), kind=kind)
    there = SparseTensor.encode(mask.cuda(), values.cuda(), values.cuda(), mask.numel(), kind=kind)
    assert torch.equal(there.where.cpu(), here.where) and torch.equal(
        there.starts.cpu(), here.starts
    )
    there.check()
    assert torch.equal(there.positions().cpu(), here.positions())
    with pytest.raises(ValueError, match="expected less"):
        replace(there, numel=int(here.positions()[-1])).check()


@pytest.mark.gpu(only="CUDA graphs")
@pytest.mark.parametrize("kind", ["index", "bitmap"])
def test_a_graph_replays_a_sparse_set(kind: str) -> None:
    entry = sparse(500_000, torch.bfloat16, torch.bfloat16, 0.03, kind)
    w = torch.ones(500_000, dtype=torch.bfloat16, device="cuda")
    prepared = Sparse([w], [to_device(entry)])
    prepared.run_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.launch_()
    for lam in (0.3, 0.0, 1.0, -0.2):
        prepared.groups[0].lams.fill_(lam)
        graph.replay()
        assert torch.equal(
            bits(w), bits(sparsely_set(torch.ones(500_000, dtype=torch.bfloat16), entry, lam))
        ), lam


@pytest.mark.gpu(only="more than 2³¹ elements")
@pytest.mark.parametrize("kind", ["index", "bitmap"])
def test_sparse_positions_past_two_to_the_31(kind: str) -> None:
    size = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 2 * size + 2**31:
        pytest.skip("needs 7 GB of free device memory")
    positions = torch.arange(0, size, 1009, device="cuda")
    b, d = (x.cuda() for x in pair(positions.numel(), torch.bfloat16, torch.bfloat16))
    w = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    sparse_set_([w], [SparseTensor.encode(positions, b, d, size, kind=kind)], 0.3)
    expected = reference.lerp(b.cpu(), d.cpu(), 0.3)
    assert torch.equal(bits(w[positions]), bits(expected))
    w[positions] = 0
    assert not any(bool(piece.any()) for piece in w.split(1 << 28))


@pytest.mark.gpu(only="compute-sanitizer")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_sanitizer(check: str) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH")
    assert sanitized(tool, check) == ""


@pytest.mark.gpu(only="CUDA graphs")
def test_a_graph_of_packed_switches_replays_for_the_lambda_that_its_tables_hold() -> None:
    b, i = pair(100_000, torch.bfloat16, torch.bfloat16)
    live = b.cuda()
    entry = PackedTensor.encode(live, i.cuda())
    assert entry is not None and torch.equal(entry.codes.cpu(), PackedTensor.encode(b, i).codes)  # type: ignore[union-attr]
    packed = Packed([live], [entry])
    packed.holds(0.0)
    packed.run_(0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed.launch_()
    for lam in (0.8, 0.25, 1.0, 0.0):
        packed.groups[0].lams.fill_(lam)
        graph.replay()
        assert same(live, reference.lerp(b, i, lam)), lam
    assert packed.wrong() == []

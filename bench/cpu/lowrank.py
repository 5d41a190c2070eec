"""A merged switch of a low-rank delta against the dense one, by rank."""

from __future__ import annotations

import torch
from pa_kernels import LowRank, reference

from bench.cases import OPS
from bench.matrices import SHAPE, Matrices, SwitchCall, normal
from bench.run import Run
from pa_fast.throughput.harness import require_bits

RANKS = (16, 64, 256)


def lowrank(run: Run) -> None:
    case = OPS["lowrank"]
    m = Matrices.drawn(case.size)
    switches: dict[str, tuple[int, SwitchCall]] = {}
    for rank in RANKS:
        us = [normal(m.generator, SHAPE[0], rank) for _ in m.base]
        vs = [normal(m.generator, rank, SHAPE[1]) for _ in m.base]
        switch = LowRank(m.live, m.base, us, vs)
        switch.run_(0.3)
        expected = reference.lowrank(m.base[0][:64], us[0][:64], vs[0], 0.3)
        steps = (m.live[0][:64].view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        require_bits(float((steps > 1).float().mean()) < 1e-4, f"low rank {rank}")
        kept = 2 * m.count + sum(factor.nbytes for factor in us + vs)
        switches[f"low rank {rank}"] = (kept, switch.run_)
    m.beside_dense(run, case, "low rank", switches)

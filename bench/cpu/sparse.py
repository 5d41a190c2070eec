"""A switch of a sparse delta against the dense one, by density: the positions alone, and as live
weights switch."""

from __future__ import annotations

import pa_kernels
import torch
from pa_kernels import SparseTensor

from bench.cases import OPS
from bench.matrices import Matrices, SwitchCall
from bench.run import Run
from pa_fast.stores.composite import CompositeStore
from pa_fast.throughput.harness import require_bits

DENSITIES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2)


def sparse(run: Run) -> None:
    case = OPS["sparse"]
    m = Matrices.drawn(case.size)
    switches: dict[str, tuple[int, SwitchCall]] = {}
    for density in DENSITIES:
        masks = [torch.rand(b.numel(), generator=m.generator) < density for b in m.base]
        entries = [
            SparseTensor.encode(mask, b.view(-1)[mask], i.view(-1)[mask], b.numel())
            for mask, b, i in zip(masks, m.base, m.instruct)
        ]
        # a live copy of its own: what somebody else wrote to is written anew, which is not to be
        # timed
        live = [b.clone() for b in m.base]
        switch = CompositeStore(live, m.base, entries, [None] * len(live))
        switch.restore_()
        switch.set_(0.3)
        for w, b, i, mask in zip(live, m.base, m.instruct, masks):
            expected = torch.where(mask.view(b.shape), torch.lerp(b, i, 0.3), b)
            same = torch.equal(w.view(torch.int16), expected.view(torch.int16))
            require_bits(same, f"sparse {density:.1%}")
        kept = sum(entry.nbytes for entry in entries)
        switches[f"sparse {density:.1%}"] = (kept, switch.set_)
        switches[f"sparse {density:.1%}, unchecked"] = (kept, pa_kernels.Sparse(live, entries).run_)
    m.beside_dense(run, case, "sparse", switches)

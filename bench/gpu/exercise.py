"""Every kernel once, at small and awkward sizes: what compute-sanitizer watches. `python -m
bench.gpu.exercise`."""

from __future__ import annotations

import torch
from pa_kernels import Lerp, LowRank, Packed, PackedTensor, Sparse, SparseTensor, checksum
from pa_kernels.reference import Draw

SIZES = ((0, 0), (1, 0), (2047, 0), (2048, 0), (5000, 0), (4096, 1), (4096, 3))
"""(elements, elements skipped before them): full tiles, tails, and pointers that are not
aligned."""


def exercise(device: str, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        dense(dtype, device)
        sparse(dtype, device)
        lowrank(dtype, device)
        if dtype != torch.float32:
            packed(dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()


def dense(dtype: torch.dtype, device: str) -> None:
    live, base, inst = (
        [torch.randn(size + skip, device=device).to(dtype)[skip:] for size, skip in SIZES]
        for _ in range(3)
    )
    for draws in (None, [Draw(t) for t in range(len(live))]):
        lerp = Lerp(live, base, inst, draws=draws)
        for lam in (0.0, 0.25, 1.5):
            lerp.run_(lam)
    checksum(live)


def sparse(dtype: torch.dtype, device: str) -> None:
    for kind in ("index", "bitmap"):
        masks = [
            torch.rand(size, device=device) < p
            for size in (1, 4099, 66_000)
            for p in (0.0, 0.01, 1.0)
        ]
        values = [torch.randn(int(mask.sum()), device=device).to(dtype) for mask in masks]
        live = [torch.zeros(mask.numel(), dtype=dtype, device=device) for mask in masks]
        Sparse(
            live,
            [SparseTensor.encode(m, v, v, m.numel(), kind=kind) for m, v in zip(masks, values)],
        ).run_(0.25)


def lowrank(dtype: torch.dtype, device: str) -> None:
    shapes = [(64, 128, 16), (130, 144, 20), (3, 5, 1)]
    base = [torch.randn(m, n, device=device).to(dtype) for m, n, _ in shapes]
    u, v = ([torch.randn(s, device=device).to(dtype) for s in sizes] for sizes in _factors(shapes))
    LowRank([torch.empty_like(b) for b in base], base, u, v).run_(0.25)


def _factors(
    shapes: list[tuple[int, int, int]],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return [(m, r) for m, _, r in shapes], [(r, n) for _, n, r in shapes]


def packed(dtype: torch.dtype, device: str) -> None:
    for width, layout in ((8, "size"), (16, "size"), (8, "speed")):
        live = [torch.randn(size, device=device).to(dtype) for size in (1, 33_000)]
        targets = [
            (w.float() * (1 + 0.02 * torch.randn(w.shape, device=device))).to(dtype) for w in live
        ]
        entries = [
            PackedTensor.encode(w, i, width=width, layout=layout) for w, i in zip(live, targets)
        ]
        kept = [(w, entry) for w, entry in zip(live, entries) if entry is not None]
        switch = Packed([w for w, _ in kept], [entry for _, entry in kept])
        switch.holds(0.0)
        for lam in (0.25, 1.0, 0.0):
            switch.run_(lam)
        assert switch.wrong() == []


if __name__ == "__main__":
    exercise("cuda", torch.bfloat16, torch.float16, torch.float32)

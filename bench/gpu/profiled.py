"""One kernel a few times over 0.27 G weights, for a profiler to watch: `python -m
bench.gpu.profiled packed`, say."""

from __future__ import annotations

import sys

import torch
from pa_kernels import Lerp, Packed, PackedTensor, checksum

KERNELS = {
    "dense": "dense_kernel",
    "packed": "packed_kernel",
    "packed-speed": "packed_kernel",
    "checksum": "checksum_kernel",
    "host": "dense_kernel",
}
"""What is watched, and the kernel that it launches."""

LAUNCHES = 3


def profiled(what: str, device: str, count: int) -> None:
    b = torch.empty(count, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    i = (b.float() + torch.empty(count, device=device).normal_(0, 0.02 * 0.017)).bfloat16()
    w = b.clone()
    if what == "host" and device == "cuda":
        b, i = b.cpu().pin_memory(), i.cpu().pin_memory()
    if what == "checksum":
        for _ in range(LAUNCHES):
            checksum([w])
    elif what.startswith("packed"):
        entry = PackedTensor.encode(b, i, layout=what.partition("-")[2] or "size")
        assert entry is not None
        packed = Packed([w], [entry])
        for group in packed.groups:
            group.state.olds.zero_()  # `holds` would launch the kernel of the checksum
        for k in range(LAUNCHES):
            packed.run_(0.25 * (k + 1))
    else:
        lerp = Lerp([w], [b], [i])
        for k in range(LAUNCHES):
            lerp.run_(0.25 * (k + 1))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    profiled(sys.argv[1], "cuda", 1 << 28)

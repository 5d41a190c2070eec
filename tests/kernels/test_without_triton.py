"""Where Triton does not exist the CPU paths work, and where it does they do not wait for it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

KERNELS = pathlib.Path(__file__).parents[2] / "kernels"

CODE = """
import sys
sys.modules["triton"] = None
import torch
from pa_kernels import Lerp, SparseTensor, checksum, lerp_, lowrank_merge_, reference
from pa_kernels import sparse_set_, truncated_svd
b, i, w = torch.randn(1000), torch.randn(1000), torch.empty(1000)
lerp_([w], [b], [i], 0.3)
assert torch.equal(w, reference.lerp(b, i, 0.3))
Lerp([w], [b], [i]).run_(0.6)
assert torch.equal(w, reference.lerp(b, i, 0.6))
assert checksum([w]) == [reference.checksum(w)]
square, merged = torch.randn(20, 30), torch.empty(20, 30)
u, v = torch.ones(20, 2), torch.ones(2, 30)
lowrank_merge_([merged], [square], [u], [v], 0.25)
assert torch.equal(merged, reference.lowrank(square, u, v, 0.25))
assert truncated_svd(square, merged, 1).relative_error < 0.01
sparse_set_([w], [SparseTensor.encode(torch.arange(0, 1000, 9), b[::9], i[::9], 1000)], 0.3)
assert torch.equal(w[::9], reference.lerp(b[::9], i[::9], 0.3))
assert not any(name.endswith("_triton") for name in sys.modules)
print("done")
"""


def test_cpu_paths_need_no_triton() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=KERNELS, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "done", done.stderr

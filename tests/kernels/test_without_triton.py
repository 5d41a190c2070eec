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
from pa_kernels import Lerp, checksum, lerp_, reference
b, i, w = torch.randn(1000), torch.randn(1000), torch.empty(1000)
lerp_([w], [b], [i], 0.3)
assert torch.equal(w, reference.lerp(b, i, 0.3))
Lerp([w], [b], [i]).run_(0.6)
assert torch.equal(w, reference.lerp(b, i, 0.6))
assert checksum([w]) == [reference.checksum(w)]
assert not any(name.endswith("_triton") for name in sys.modules)
print("done")
"""


def test_cpu_paths_need_no_triton() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=KERNELS, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr

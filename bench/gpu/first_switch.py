"""The first switch of a process: compilation with an empty and with a filled cache of Triton's, in
processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from bench.gpu.run import GpuRun
from bench.machine import ROOT
from pa_fast.throughput.harness import Way, by_wall


def first_switch(run: GpuRun) -> None:
    took: dict[str, list[float]] = {"empty cache": [], "filled cache": [], "second switch": []}
    for _ in range(1 if run.rehearsal else 3):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("empty cache", "filled cache"):
                first, second = _process(cache, str(run.device))
                took[name].append(first)
                took["second switch"].append(second)
    ways = [
        Way(f"first switch, {name}" if "cache" in name else name, seconds=tuple(seconds))
        for name, seconds in took.items()
    ]
    run.record("", "first switch of a process", ways, "second switch")


def _process(cache: str, device: str) -> tuple[float, float]:
    """Seconds of the first and the second switch in a fresh process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.first_switch", device],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"a process that was to switch once ended with {done.returncode}: {done.stderr[-1000:]}"
        )
    first, second = json.loads(done.stdout)
    return first, second


def main(device: str) -> None:
    import torch
    from pa_kernels import Lerp

    b, i = (torch.randn(8192, device=device).bfloat16() for _ in range(2))
    lerp = Lerp([torch.empty_like(b)], [b], [i])
    time.sleep(0.1)
    print(json.dumps([by_wall(lambda: lerp.run_(0.25)).wall_s for _ in range(2)]))


if __name__ == "__main__":
    main(sys.argv[1])

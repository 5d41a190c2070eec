"""The vLLM engine on a GPU, where vLLM is installed: its tests beside unmodified vLLM."""

from __future__ import annotations

import importlib.util

from bench.gpu.run import GpuRun
from bench.run import Skip
from bench.suite import tests_passed

TESTS = ("tests/vllm/test_sweep.py", "tests/vllm/test_caches.py")


def vllm(run: GpuRun) -> None:
    """The tests that need no second device, as a note; one that fails is an error of the run."""
    if run.rehearsal:
        run.note("the vLLM engine is tested by `make vllm` on a CPU")
        return
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    passed = tests_passed(*TESTS, "-p", "no:cacheprovider")
    if not passed:
        raise RuntimeError("the vLLM engine differs from unmodified vLLM")
    run.note(f"vLLM engine beside unmodified vLLM: {passed}")

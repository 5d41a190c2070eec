"""The static gate: what compilers make of every kernel, for every target, without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from pa_kernels import offline
from pa_kernels.tiles import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")

REGISTERS = {"cuda": 40, "hip": 64}
"""At these bounds an SM still holds 48 warps, and a SIMD of a CDNA 3 unit its 8 waves."""

INSTRUCTIONS = {"lerp": 24.0, "checksum": 30.0}
"""Per weight and per 64-bit word: an H200 at full bandwidth has about 34 for a bf16 weight switched, 54 for a word read."""


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("kernel", offline.kernels(), ids=lambda kernel: kernel.name)
def test_gate(kernel: offline.Kernel, target: str) -> None:
    made = offline.compile_for(kernel, target)
    backend = offline.TARGETS[target].backend
    # every byte of a full tile moves in a 128-bit access: a narrower one would be missing from this sum
    assert made.bytes_per_element == kernel.bytes_per_element
    assert made.spills == 0
    assert made.keeps_denormals
    assert made.registers <= REGISTERS[backend]
    assert made.instructions_per_element <= INSTRUCTIONS[kernel.name.split()[0]]
    rounds_to_bf16 = offline.lerp_triton.tl.bfloat16 in (kernel.constants.get("OUT"), kernel.constants.get("VIA"))
    if backend == "cuda" and rounds_to_bf16:
        assert made.packed_rounding > 0


def test_the_gate_notices_a_launch_that_narrows_accesses() -> None:
    # 4 elements a thread of a 16-bit dtype are 64 bits
    narrow = offline.lerp(offline.BF16, offline.BF16, offline.BF16, launch=offline.Launch(block=1024, threads=256))
    made = offline.compile_for(narrow, "sm_90")
    assert made.bytes_per_element < narrow.bytes_per_element


def test_the_gate_notices_a_launch_that_needs_more_registers() -> None:
    fat = offline.lerp(offline.FP32, offline.FP32, offline.FP32, launch=offline.Launch(block=8192, threads=128))
    assert offline.compile_for(fat, "sm_90").registers > REGISTERS["cuda"]


def test_the_table_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "kernels", lambda: [offline.checksum()])
    offline.main()
    printed = capsys.readouterr().out
    assert all(target in printed for target in offline.TARGETS)

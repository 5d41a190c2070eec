"""What the compilers make of our kernels, for any target, without a GPU: `python -m pa_kernels.offline` prints it.

Counts come from the machine code along one path: the one that a full tile takes, from entry to exit. They are static
facts that tests hold on to, not measurements.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pa_kernels import checksum_triton, lerp_triton
from pa_kernels.reference import CHUNK_WORDS
from pa_kernels.tiles import INTERPRETED, Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

LERP_KINDS: tuple[tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None], ...] = (
    (BF16, BF16, BF16, None),
    (FP16, FP16, FP16, None),
    (FP32, FP32, FP32, None),
    (BF16, FP32, BF16, None),
    (BF16, FP16, BF16, None),
    (FP32, BF16, BF16, BF16),
    (FP32, FP32, BF16, BF16),
)
"""(out, base, inst, via): one dtype throughout, and the mixes of real pairs."""


@dataclass(frozen=True)
class Kernel:
    """One kernel with everything that fixes its code."""

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    launch: Launch
    bytes_per_element: int


@dataclass(frozen=True)
class Compiled:
    """What one compiler made of one kernel.

    Attributes:
        wide_loads, wide_stores: 128-bit global accesses on the full tile's path, per thread.
        bytes_per_element: what these move; equal to the kernel's own figure only if no access is narrower.
        instructions_per_element: machine instructions on that path, tables and addresses included.
        registers: per thread (vector registers on AMD).
        spills: registers or bytes spilled; 0 is the only good value.
        packed_rounding: conversions to bf16 that round two values at once.
    """

    kernel: str
    target: str
    wide_loads: int
    wide_stores: int
    bytes_per_element: float
    instructions_per_element: float
    registers: int
    spills: int
    packed_rounding: int


def lerp(
    out: torch.dtype, base: torch.dtype, inst: torch.dtype, via: torch.dtype | None = None, launch: Launch | None = None
) -> Kernel:
    """The lerp kernel for one dtype tuple."""
    launch = launch or lerp_triton.launch_for(out, base, inst)
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    name = f"lerp {short[base]},{short[inst]}→{short[out]}" + (f" via {short[via]}" if via else "")
    signature = {"words": "*i64", "sizes": "*i64", "outs": "*i64", "bases": "*i64", "insts": "*i64", "lams": "*fp32"}
    constants = lerp_triton.constants(out, base, inst, via, launch)
    moved = out.itemsize + base.itemsize + inst.itemsize
    return Kernel(name, lerp_triton.lerp_kernel, signature, constants, lerp_triton.OPTIONS, launch, moved)


def checksum(launch: Launch = checksum_triton.LAUNCH) -> Kernel:
    """The checksum kernel; its element is a 64-bit word."""
    signature = {"words": "*i64", "sizes": "*i64", "pointers": "*i64", "sums": "*i64"}
    constants = checksum_triton.constants(launch)
    return Kernel("checksum", checksum_triton.checksum_kernel, signature, constants, checksum_triton.OPTIONS, launch, 8)


def kernels() -> list[Kernel]:
    """Every kernel of this package, as it is launched."""
    return [*(lerp(*kind) for kind in LERP_KINDS), checksum()]


def compile_for(kernel: Kernel, target: str) -> Compiled:
    """Compile for one of TARGETS and read the result back.

    Raises:
        RuntimeError: Triton is interpreting (TRITON_INTERPRET=1), so that there is nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    names = kernel.function.arg_names
    source = ASTSource(
        kernel.function,
        {**kernel.signature, **dict.fromkeys(kernel.constants, "constexpr")},
        {(names.index(name),): value for name, value in kernel.constants.items()},
    )
    made = triton.compile(source, target=TARGETS[target], options={"num_warps": kernel.launch.num_warps, **kernel.options})
    backend = TARGETS[target].backend
    reading = _read_cuda(made.asm["ptx"], made.asm["cubin"]) if backend == "cuda" else _read_amd(made.asm["amdgcn"])
    path = _full_tile_path(reading.instructions, reading.wide)
    loads = sum(bool(re.search(reading.wide, text)) and "store" not in text and "ST" not in text for text in path)
    stores = sum(bool(re.search(reading.wide, text)) for text in path) - loads
    threads = kernel.launch.num_warps * TARGETS[target].warp_size
    return Compiled(
        kernel.name,
        target,
        loads,
        stores,
        (loads + stores) * 16 * threads / kernel.launch.block,
        len(path) * threads / kernel.launch.block,
        reading.registers,
        reading.spills,
        reading.packed_rounding,
    )


@dataclass(frozen=True)
class _Instruction:
    text: str
    jump: int | None = None  # index of the target
    falls: bool = True  # whether the next instruction may follow


@dataclass(frozen=True)
class _Reading:
    instructions: Sequence[_Instruction]
    wide: str
    registers: int
    spills: int
    packed_rounding: int


def _read_cuda(ptx: str, cubin: bytes) -> _Reading:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", sass, re.MULTILINE)
    index = {int(address, 16): n for n, (address, _) in enumerate(lines)}
    instructions = []
    for _, text in lines:
        target = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        ends = re.match(r"(BRA|EXIT|RET)\b", text)
        instructions.append(_Instruction(text, index.get(int(target[1], 16)) if target else None, ends is None))
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    spills = int(resources["STACK"]) + int(resources["LOCAL"]) + len(re.findall(r"\b(?:STL|LDL)\b", sass))
    packed = len(re.findall(r"cvt\.rn\.bf16x2\.f32", ptx))
    return _Reading(instructions, r"\b(?:LDG|STG)\.E\S*\.128\b", int(resources["REG"]), spills, packed)


def _read_amd(text: str) -> _Reading:
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\t[a-z]+_\w+", line):
            lines.append(line.split(";")[0].strip())
        if line.strip().startswith(".section"):
            break
    instructions = []
    for line in lines:
        target = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        ends = re.match(r"s_(?:branch|endpgm|setpc)", line)
        instructions.append(_Instruction(line, labels.get(target[1]) if target else None, ends is None))
    counts = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    return _Reading(instructions, r"\b(?:global|buffer)_(?:load|store)_dwordx4\b", counts["vgpr_count"], spills, 0)


def _full_tile_path(instructions: Sequence[_Instruction], wide: str) -> list[str]:
    """The way from entry to exit with the most 128-bit accesses, and of these the longest; loops are walked once."""

    def walks(at: int, seen: frozenset[int]) -> Iterator[list[str]]:
        texts: list[str] = []
        while at < len(instructions) and at not in seen:
            step = instructions[at]
            texts.append(step.text)
            seen |= {at}
            if step.jump is not None:
                for rest in walks(step.jump, seen):
                    yield texts + rest
            if not step.falls:
                break
            at += 1
        yield texts

    def score(path: list[str]) -> tuple[int, int]:
        return sum(bool(re.search(wide, text)) for text in path), len(path)

    return max(walks(0, frozenset()), key=score)


def main() -> None:
    header = f"{'kernel':32} {'target':8} {'128-bit ld/st':>13} {'bytes/el':>9} {'instr/el':>9} {'registers':>9} {'spills':>6} {'bf16x2':>6}"
    print(f"triton {triton.__version__}\n{header}")
    for kernel in kernels():
        for target in TARGETS:
            row = compile_for(kernel, target)
            accesses = f"{row.wide_loads}/{row.wide_stores}"
            print(
                f"{row.kernel:32} {row.target:8} {accesses:>13} {row.bytes_per_element:9.2f} {row.instructions_per_element:9.1f} "
                f"{row.registers:9} {row.spills:6} {row.packed_rounding:6}"
            )


if __name__ == "__main__":
    main()

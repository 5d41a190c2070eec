"""What the compilers make of our kernels, for any target, without a GPU: `python -m
pa_kernels.offline` prints it.

Counts come from the machine code along one path: the one that a full tile takes, from entry to
exit. They are static facts that tests hold on to, not measurements.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pa_kernels import (
    checksum_triton,
    drawn_triton,
    lerp_triton,
    lowrank_triton,
    packed_triton,
    sparse_triton,
)
from pa_kernels.packed_tensor import BLOCK
from pa_kernels.sparse_tensor import Kind
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

DRAWN_KINDS: tuple[tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None], ...] = (
    (BF16, BF16, BF16, None),
    (FP16, FP16, FP16, None),
    (BF16, FP32, BF16, None),
    (FP32, FP32, BF16, BF16),
)
"""The same of the lerp with stochastic rounding."""

LOWRANK_KINDS: tuple[
    tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None, bool], ...
] = (
    (BF16, BF16, BF16, None, True),
    (FP16, FP16, FP16, None, True),
    (FP32, FP32, FP32, None, True),
    (BF16, BF16, FP32, None, True),
    (BF16, FP32, BF16, None, True),
    (FP32, FP32, BF16, BF16, True),
    (BF16, BF16, BF16, None, False),
    (FP32, FP32, FP32, None, False),
)
"""(out, base, factors, via, whole aligned tiles)."""

SPARSE_KINDS: tuple[tuple[Kind, torch.dtype, torch.dtype, torch.dtype, torch.dtype | None], ...] = (
    ("index", BF16, BF16, BF16, None),
    ("index", FP16, FP16, FP16, None),
    ("index", FP32, FP32, FP32, None),
    ("index", BF16, FP32, BF16, None),
    ("index", FP32, FP32, BF16, BF16),
    ("bitmap", BF16, BF16, BF16, None),
    ("bitmap", FP32, FP32, FP32, None),
    ("bitmap", BF16, FP32, BF16, None),
)
"""(kind, out, base, target, via)."""


PACKED_KINDS = ((BF16, 8), (BF16, 16), (FP16, 8), (FP16, 16))
"""(dtype, width of codes)."""


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
        bytes_per_element: what these move; equal to the kernel's own figure only if no access is
            narrower.
        instructions_per_element: machine instructions on that path, tables and addresses included.
        registers: per thread (vector registers on AMD).
        spills: registers or bytes spilled; 0 is the only good value.
        packed_rounding: machine instructions that round two values to bf16 at once.
        matrix: instructions of the matrix units.
        narrow: global accesses of 8 or 16 bits, on any path.
        keeps_denormals: whether no instruction, and no mode, flushes denormal numbers.
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
    matrix: int
    narrow: int
    keeps_denormals: bool


def lerp(
    out: torch.dtype,
    base: torch.dtype,
    inst: torch.dtype,
    via: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Kernel:
    """The lerp kernel for one dtype tuple."""
    return _dense("lerp", lerp_triton.lerp_kernel, {}, out, base, inst, via, launch)


def drawn(
    out: torch.dtype,
    base: torch.dtype,
    inst: torch.dtype,
    via: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Kernel:
    """The lerp kernel with stochastic rounding for one dtype tuple."""
    return _dense(
        "drawn", drawn_triton.drawn_kernel, {"draws": "*i64"}, out, base, inst, via, launch
    )


def _dense(
    op: str,
    function: Any,
    tables: Mapping[str, str],
    out: torch.dtype,
    base: torch.dtype,
    inst: torch.dtype,
    via: torch.dtype | None,
    launch: Launch | None,
) -> Kernel:
    launch = launch or lerp_triton.launch_for(out, base, inst)
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    name = f"{op} {short[base]},{short[inst]}→{short[out]}" + (f" via {short[via]}" if via else "")
    signature = {
        "words": "*i64",
        "sizes": "*i64",
        "outs": "*i64",
        "bases": "*i64",
        "insts": "*i64",
        "lams": "*fp32",
        **tables,
    }
    constants = lerp_triton.constants(out, base, inst, via, launch)
    moved = out.itemsize + base.itemsize + inst.itemsize
    return Kernel(name, function, signature, constants, lerp_triton.OPTIONS, launch, moved)


def checksum(launch: Launch = checksum_triton.LAUNCH) -> Kernel:
    """The checksum kernel; its element is a 64-bit word."""
    signature = {"words": "*i64", "sizes": "*i64", "pointers": "*i64", "sums": "*i64"}
    constants = checksum_triton.constants(launch)
    return Kernel(
        "checksum",
        checksum_triton.checksum_kernel,
        signature,
        constants,
        checksum_triton.OPTIONS,
        launch,
        8,
    )


def lowrank(
    out: torch.dtype,
    base: torch.dtype,
    factor: torch.dtype,
    via: torch.dtype | None = None,
    full: bool = True,
    launch: Launch = lowrank_triton.LAUNCH,
) -> Kernel:
    """The low-rank merge for one dtype tuple. Its element is a weight, the bytes of it do not count
    the factors'."""
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    name = f"lowrank{'' if full else ' edge'} {short[base]}+{short[factor]}→{short[out]}" + (
        f" via {short[via]}" if via else ""
    )
    tables = dict.fromkeys(
        ("words", "heights", "widths", "ranks", "outs", "bases", "us", "vs"), "*i64"
    )
    constants = lowrank_triton.constants(out, base, factor, via, full, launch)
    launch = lowrank_triton.launch_for(full, launch)
    options = lowrank_triton.options(out, base, factor, full)
    moved = out.itemsize + base.itemsize
    return Kernel(
        name,
        lowrank_triton.lowrank_kernel,
        {**tables, "lams": "*fp32"},
        constants,
        options,
        launch,
        moved,
    )


def sparse(
    kind: Kind,
    out: torch.dtype,
    base: torch.dtype,
    target: torch.dtype,
    via: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Kernel:
    """The sparse set of one kind for one dtype tuple. Its element is an entry of an index list,
    whose bytes count but not those of its scattered store, or a bit of a bitmap, none of whose
    values move in wide accesses."""
    launch = launch or sparse_triton.LAUNCHES[kind]
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    name = f"sparse {kind} {short[base]},{short[target]}→{short[out]}" + (
        f" via {short[via]}" if via else ""
    )
    kernel = sparse_triton.index_kernel if kind == "index" else sparse_triton.bitmap_kernel
    constants = sparse_triton.constants(kind, out, base, target, via, launch)
    tables = {argument: "*i64" for argument in kernel.arg_names if argument not in constants}
    moved = 2 + base.itemsize + target.itemsize if kind == "index" else 0
    return Kernel(
        name, kernel, {**tables, "lams": "*fp32"}, constants, sparse_triton.OPTIONS, launch, moved
    )


def packed(dtype: torch.dtype, width: int, launch: Launch | None = None) -> Kernel:
    """The packed switch for one dtype and width of codes. Bytes and instructions are those of a
    block of two planes, tables and sums at its ends included: the program walks a tile's blocks in
    a loop, which is counted once.
    """
    launch = launch or packed_triton.LAUNCHES[width]
    constants = packed_triton.constants(dtype, width, launch, nvidia=False)
    function = packed_triton.packed_kernel
    tables = {name: "*i64" for name in function.arg_names if name not in constants} | {
        "olds": "*fp32",
        "lams": "*fp32",
    }
    name = f"packed {width}-bit {'bf16' if dtype == BF16 else 'fp16'}"
    looped = Launch(BLOCK, launch.threads)
    return Kernel(name, function, tables, constants, packed_triton.OPTIONS, looped, 4 + width // 8)


def kernels() -> list[Kernel]:
    """Every kernel of this package, as it is launched."""
    return [
        *(lerp(*kind) for kind in LERP_KINDS),
        *(drawn(*kind) for kind in DRAWN_KINDS),
        checksum(),
        *(lowrank(*kind) for kind in LOWRANK_KINDS),
        *(sparse(*kind) for kind in SPARSE_KINDS),
        *(packed(*kind) for kind in PACKED_KINDS),
    ]


def compile_for(kernel: Kernel, target: str) -> Compiled:
    """Compile for one of TARGETS and read the result back.

    Raises:
        RuntimeError: Triton is interpreting (TRITON_INTERPRET=1), so that there is nothing to
            compile.
    """
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be"
            " compiled"
        )
    names = kernel.function.arg_names
    constants = dict(kernel.constants)
    if "ASM" in constants:
        constants["ASM"] = TARGETS[target].backend == "cuda"
    source = ASTSource(
        kernel.function,
        {**kernel.signature, **dict.fromkeys(constants, "constexpr")},
        {(names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(
        source,
        target=TARGETS[target],
        options={"num_warps": kernel.launch.num_warps(TARGETS[target].warp_size), **kernel.options},
    )
    backend = TARGETS[target].backend
    reading = (
        _read_cuda(made.asm["ptx"], made.asm["cubin"])
        if backend == "cuda"
        else _read_amd(made.asm["amdgcn"])
    )
    loads, stores, length = _full_tile_path(reading.instructions)
    threads_per_element = kernel.launch.threads / kernel.launch.block
    return Compiled(
        kernel.name,
        target,
        loads,
        stores,
        (loads + stores) * 16 * threads_per_element,
        length * threads_per_element,
        reading.registers,
        reading.spills,
        reading.packed_rounding,
        reading.matrix,
        reading.narrow,
        reading.keeps_denormals,
    )


@dataclass(frozen=True)
class _Instruction:
    """One machine instruction: whether it is a 128-bit load or store, where it may jump, whether
    the next may follow, and whether the program may end with it."""

    load: bool
    store: bool
    jump: int | None
    falls: bool
    leaves: bool


@dataclass(frozen=True)
class _Reading:
    instructions: Sequence[_Instruction]
    registers: int
    spills: int
    packed_rounding: int
    matrix: int
    narrow: int
    keeps_denormals: bool


def _read_cuda(ptx: str, cubin: bytes) -> _Reading:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        sass = subprocess.run(
            [tool, "--dump-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", sass, re.MULTILINE)
    index = {int(address, 16): n for n, (address, _) in enumerate(lines)}
    instructions = []
    for _, text in lines:
        # sm_80 leaves loops by calls that do not return
        target = re.search(r"\b(?:BRA|CALL\.REL\.NOINC)\b.*?(0x[0-9a-f]+)", text)
        # a guard stands before the instruction (@P0) or, for uniform predicates, inside it (BRA.U
        # !UP0)
        ends = re.match(r"(BRA|EXIT|RET)\b", text) and not re.search(r"\bU?P\d", text)
        wide = re.search(r"\b(LDG|STG)(?:STS)?\.E\S*\.128\b", text)
        access = wide[1] if wide else None
        instructions.append(
            _Instruction(
                load=access == "LDG",
                store=access == "STG",
                jump=index.get(int(target[1], 16)) if target else None,
                falls=not ends,
                leaves=re.search(r"\b(EXIT|RET)\b", text) is not None,
            )
        )
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    spills = (
        int(resources["STACK"])
        + int(resources["LOCAL"])
        + len(re.findall(r"\b(?:STL|LDL)\b", sass))
    )
    # in the machine code: ptxas makes pairs of single conversions, too
    packed = len(re.findall(r"\bF2FP\.BF16\S*\.PACK_AB \S+ (?!RZ)", sass))
    matrix = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass))
    narrow = len(re.findall(r"\b(?:LDG|STG)\.E\S*\.[US](?:8|16)\b", sass))
    return _Reading(
        instructions, int(resources["REG"]), spills, packed, matrix, narrow, ".ftz" not in ptx
    )


def _read_amd(text: str) -> _Reading:
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.split("\t.section")[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\t[a-z]+_\w+", line):
            lines.append(line.split(";")[0].strip())
    instructions = []
    for line in lines:
        target = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        wide = re.match(r"(?:global|buffer)_(load|store)_dwordx4\b", line)
        access = wide[1] if wide else None
        instructions.append(
            _Instruction(
                load=access == "load",
                store=access == "store",
                jump=labels.get(target[1]) if target else None,
                falls=not re.match(r"s_(?:branch|endpgm|setpc)", line),
                leaves=re.match(r"s_(?:endpgm|setpc)", line) is not None,
            )
        )
    counts = {
        name: int(value)
        for name, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text
        )
    }
    # bits 0 and 1: keep denormal inputs and results
    keeps = re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text) is not None
    spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    matrix = len(re.findall(r"^\tv_mfma_", text, re.MULTILINE))
    narrow = len(
        re.findall(r"^\t(?:global|buffer)_(?:load|store)_[us]?(?:byte|short)", text, re.MULTILINE)
    )
    return _Reading(instructions, counts["vgpr_count"], spills, 0, matrix, narrow, keeps)


def _full_tile_path(instructions: Sequence[_Instruction]) -> tuple[int, int, int]:
    """128-bit loads, 128-bit stores and instructions on the full tile's way from entry to exit.

    Of all ways, loops walked once, it is the shortest of those with the most loads and the fewest
    stores but not none: a compiler for AMD joins the two signs of λ behind conditions that only one
    of them meets.
    """
    # for each instruction: (loads, stores) from here to the exit → fewest instructions; None while
    # the walk is below it
    ways: dict[int, dict[tuple[int, int], int] | None] = {}
    walk = [0]
    while walk:
        at = walk[-1]
        step = instructions[at]
        follow = [step.jump] if step.jump is not None else []
        if step.falls and at + 1 < len(instructions):
            follow.append(at + 1)
        if at not in ways:
            ways[at] = None
            walk += [to for to in follow if to not in ways]
            continue
        walk.pop()
        if ways[at] is not None:
            continue
        # a way that is still open leads back to a loop's head; an exit that only some threads take
        # counts where others have none
        after = [way for way in map(ways.get, follow) if way]
        if step.leaves and not after:
            after = [{(0, 0): 0}]
        found: dict[tuple[int, int], int] = {}
        for loads, stores, length in (
            (*key, length) for way in after for key, length in way.items()
        ):
            key = (loads + step.load, stores + step.store)
            found[key] = min(length + 1, found.get(key, length + 1))
        ways[at] = found
    whole = ways[0] or {}
    stored = any(stores for _, stores in whole)
    loads, stores = max(
        (key for key in whole if key[1] or not stored), key=lambda key: (key[0], -key[1])
    )
    return loads, stores, whole[loads, stores]


def main() -> None:
    print(
        f"triton {triton.__version__}; el: weight, 64-bit word for checksum, entry of an index"
        " list, bit of a bitmap"
    )
    print(f"{'kernel':32} target   128-bit ld/st  bytes/el  instr/el  registers  spills  bf16x2")
    for kernel in kernels():
        for target in TARGETS:
            row = compile_for(kernel, target)
            print(
                f"{row.kernel:32} {target:8} {row.wide_loads:>10}/{row.wide_stores}"
                f" {row.bytes_per_element:9.2f} {row.instructions_per_element:9.1f}"
                f" {row.registers:10} {row.spills:7} {row.packed_rounding:7}"
            )


if __name__ == "__main__":
    main()

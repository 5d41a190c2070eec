"""Offline compilation of the kernels, for any target, without a GPU: `python -m
pa_kernels.offline` prints it.

Counts come from the machine code along one path: the one that a full tile takes, from entry to
exit. They are static facts that tests hold on to, not measurements.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pa_kernels import checksum_triton, dense_triton, lowrank_triton, sparse_triton
from pa_kernels.packed import triton as packed_triton
from pa_kernels.packed.codes import BLOCK
from pa_kernels.tiles import INTERPRETED, OPTIONS, Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]

DENSE_KINDS: tuple[tuple[Dtypes, torch.dtype | None, bool], ...] = (
    ((BF16, BF16, BF16), None, False),
    ((FP16, FP16, FP16), None, False),
    ((FP32, FP32, FP32), None, False),
    ((BF16, FP32, BF16), None, False),
    ((BF16, FP16, BF16), None, False),
    ((FP32, BF16, BF16), BF16, False),
    ((FP32, FP32, BF16), BF16, False),
    ((BF16, BF16, BF16), None, True),
    ((FP16, FP16, FP16), None, True),
    ((BF16, FP32, BF16), None, True),
    ((FP32, FP32, BF16), BF16, True),
)
"""(dtypes of out, base and inst; intermediate dtype; whether rounding is stochastic): one dtype
throughout, and the mixes of real pairs."""

LOWRANK_KINDS: tuple[tuple[Dtypes, torch.dtype | None, bool], ...] = (
    ((BF16, BF16, BF16), None, True),
    ((FP16, FP16, FP16), None, True),
    ((FP32, FP32, FP32), None, True),
    ((BF16, BF16, FP32), None, True),
    ((BF16, FP32, BF16), None, True),
    ((FP32, FP32, BF16), BF16, True),
    ((BF16, BF16, BF16), None, False),
    ((FP32, FP32, FP32), None, False),
)
"""(dtypes of out, base and factors; intermediate dtype; whole aligned tiles)."""

SPARSE_KINDS: tuple[tuple[str, Dtypes, torch.dtype | None], ...] = (
    ("index", (BF16, BF16, BF16), None),
    ("index", (FP16, FP16, FP16), None),
    ("index", (FP32, FP32, FP32), None),
    ("index", (BF16, FP32, BF16), None),
    ("index", (FP32, FP32, BF16), BF16),
    ("bitmap", (BF16, BF16, BF16), None),
    ("bitmap", (FP32, FP32, FP32), None),
    ("bitmap", (BF16, FP32, BF16), None),
)
"""(kind; dtypes of out, base and target; intermediate dtype)."""

PACKED_KINDS = (
    (BF16, 8, "size"),
    (BF16, 16, "size"),
    (FP16, 8, "size"),
    (FP16, 16, "size"),
    (BF16, 8, "speed"),
    (FP16, 8, "speed"),
)
"""(dtype, width and layout of codes)."""


TYPES = {
    "lams": "*fp32",
    "olds": "*fp32",
    "moveds": "*fp32",
    "distances": "*fp32",
    "count": "i32",
}
"""Of arguments by name, where they are no int64 tables."""


@dataclass(frozen=True)
class Kernel:
    """One kernel with everything that fixes its code."""

    name: str
    function: Any
    constants: Mapping[str, Any]
    launch: Launch
    bytes_per_element: int
    options: Mapping[str, Any] = field(default_factory=lambda: OPTIONS)

    @property
    def signature(self) -> dict[str, str]:
        """Types of all arguments: tables are int64 if not said otherwise."""
        types = {name: TYPES.get(name, "*i64") for name in self.function.arg_names}
        return types | dict.fromkeys(self.constants, "constexpr")


@dataclass(frozen=True)
class Compiled:
    """One kernel as one compiler made it.

    Attributes:
        wide_loads, wide_stores: 128-bit global accesses on the full tile's path, per thread.
        bytes_per_element: what these move; equal to the kernel's own figure only if no access is
            narrower.
        instructions_per_element: machine instructions on that path, tables and addresses included.
        loop_per_element: of a kernel that walks its tile in a loop, those of that loop (of the
            longest, where it stands in several versions); else 0.
        alu_per_element: of these the ones of NVIDIA's ALU, which takes half as many as are issued:
            logic, shifts, additions and comparisons of integers, comparisons and selections of
            floats, `I2FP`.
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
    loop_per_element: float
    alu_per_element: float
    registers: int
    spills: int
    packed_rounding: int
    matrix: int
    narrow: int
    keeps_denormals: bool


def dense(
    dtypes: Dtypes,
    intermediate_dtype: torch.dtype | None = None,
    is_stochastic: bool = False,
    launch: Launch | None = None,
    records: bool = False,
) -> Kernel:
    """The dense lerp for dtypes of out, base and inst."""
    launch = launch or dense_triton.launch_for(dtypes, records)
    constants = dense_triton.constants(dtypes, intermediate_dtype, is_stochastic, records, launch)
    if not is_stochastic:
        constants["draws"] = None
    if not records:
        constants.update(dict.fromkeys(("sums", "moveds", "distances")))
    op = "stochastic" if is_stochastic else "dense"
    name = f"{'recorded ' if records else ''}{op} {_named(dtypes, intermediate_dtype)}"
    moved = sum(dtype.itemsize for dtype in dtypes)
    return Kernel(name, dense_triton.dense_kernel, constants, launch, moved)


def checksum(launch: Launch = checksum_triton.LAUNCH) -> Kernel:
    """The checksum kernel; its element is a 64-bit word."""
    function, constants = checksum_triton.checksum_kernel, checksum_triton.constants(launch)
    return Kernel("checksum", function, constants, launch, 8)


def lowrank(
    dtypes: Dtypes,
    intermediate_dtype: torch.dtype | None = None,
    full: bool = True,
    launch: Launch = lowrank_triton.LAUNCH,
) -> Kernel:
    """The low-rank merge for dtypes of out, base and factors. Its element is a weight, the bytes of
    it do not count the factors'."""
    return Kernel(
        f"lowrank{'' if full else ' edge'} {_named(dtypes, intermediate_dtype, '+')}",
        lowrank_triton.lowrank_kernel,
        lowrank_triton.constants(dtypes, intermediate_dtype, full, launch),
        lowrank_triton.launch_for(full, launch),
        dtypes[0].itemsize + dtypes[1].itemsize,
        lowrank_triton.options(dtypes, full),
    )


def sparse(
    kind: str,
    dtypes: Dtypes,
    intermediate_dtype: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Kernel:
    """The sparse set of one kind for dtypes of out, base and target. Its element is an entry of an
    index list, whose bytes count but not those of its scattered store, or a bit of a bitmap, none
    of whose values move in wide accesses."""
    launch = launch or sparse_triton.LAUNCHES[kind]
    return Kernel(
        f"sparse {kind} {_named(dtypes, intermediate_dtype)}",
        sparse_triton.KERNELS[kind],
        sparse_triton.constants(kind, dtypes, intermediate_dtype, launch),
        launch,
        2 + dtypes[1].itemsize + dtypes[2].itemsize if kind == "index" else 0,
    )


def packed(
    dtype: torch.dtype, width: int, layout: str = "size", launch: Launch | None = None
) -> Kernel:
    """The packed switch for one dtype, width and layout of codes. Bytes and instructions are those
    of a block of two planes, tables and sums at its ends included: the program walks a tile's
    blocks in a loop, which is counted once.
    """
    launch = launch or packed_triton.LAUNCHES[width]
    return Kernel(
        f"packed {width}-bit {SHORT[dtype]}{' speed' * (layout == 'speed')}",
        packed_triton.packed_kernel,
        packed_triton.constants(dtype, width, layout, launch, nvidia=False),
        Launch(BLOCK, launch.threads),
        4 + width // 8,
    )


def _named(dtypes: Dtypes, intermediate_dtype: torch.dtype | None, joint: str = ",") -> str:
    out, *sources = (SHORT[dtype] for dtype in dtypes)
    through = "" if intermediate_dtype is None else f" through {SHORT[intermediate_dtype]}"
    return f"{joint.join(sources)}→{out}{through}"


def kernels() -> list[Kernel]:
    """Every kernel of this package, as it is launched."""
    return [
        *(dense(*kind) for kind in DENSE_KINDS),
        *(dense(*kind, records=True) for kind in DENSE_KINDS),
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
        kernel.signature,
        {(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(
        source,
        target=TARGETS[target],
        options={"num_warps": kernel.launch.num_warps(TARGETS[target].warp_size), **kernel.options},
    )
    backend = TARGETS[target].backend
    instructions, counts = (
        _read_cuda(compiled.asm["ptx"], compiled.asm["cubin"])
        if backend == "cuda"
        else _read_amd(compiled.asm["amdgcn"])
    )
    loads, stores, length = _full_tile_path(instructions)
    threads_per_element = kernel.launch.threads / kernel.launch.block
    loop = max(_loops(instructions), key=len, default=[])
    return Compiled(
        kernel=kernel.name,
        target=target,
        wide_loads=loads,
        wide_stores=stores,
        bytes_per_element=(loads + stores) * 16 * threads_per_element,
        instructions_per_element=length * threads_per_element,
        loop_per_element=len(loop) * threads_per_element,
        alu_per_element=sum(step.alu for step in loop) * threads_per_element,
        **counts,
    )


@dataclass(frozen=True)
class _Instruction:
    """One machine instruction: whether it is a 128-bit load or store, where it may jump, whether
    the next may follow, whether the program may end with it, and whether it is one of the ALU."""

    load: bool
    store: bool
    jump: int | None
    falls: bool
    leaves: bool
    alu: bool = False


_ALU = re.compile(
    r"(?:@!?U?P\d+ +)?(?:LOP3|LOP|PLOP3|SHF|LEA|IADD3?|VIADD|V?IMNMX3?|VIADDMNMX|IABS|SGXT|BMSK"
    r"|PRMT|SEL|FSEL|ISETP|FSETP|FMNMX3?|MOV|I2FP)\b"
)

_Reading = tuple[list[_Instruction], dict[str, Any]]
"""A program, and what `Compiled` says of it beside its full tile's path."""


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
        is_last = re.match(r"(BRA|EXIT|RET)\b", text) and not re.search(r"\bU?P\d", text)
        wide = re.search(r"\b(LDG|STG)(?:STS)?\.E\S*\.128\b", text)
        access = wide[1] if wide else None
        instructions.append(
            _Instruction(
                load=access == "LDG",
                store=access == "STG",
                jump=index.get(int(target[1], 16)) if target else None,
                falls=not is_last,
                leaves=re.search(r"\b(EXIT|RET)\b", text) is not None,
                alu=_ALU.match(text) is not None,
            )
        )
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    spills = (
        int(resources["STACK"])
        + int(resources["LOCAL"])
        + len(re.findall(r"\b(?:STL|LDL)\b", sass))
    )
    return instructions, {
        "registers": int(resources["REG"]),
        "spills": spills,
        # in the machine code: ptxas makes pairs of single conversions, too
        "packed_rounding": len(re.findall(r"\bF2FP\.BF16\S*\.PACK_AB \S+ (?!RZ)", sass)),
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass)),
        "narrow": len(re.findall(r"\b(?:LDG|STG)\.E\S*\.[US](?:8|16)\b", sass)),
        "keeps_denormals": ".ftz" not in ptx,
    }


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
    narrow = r"^\t(?:global|buffer)_(?:load|store)_[us]?(?:byte|short)"
    return instructions, {
        "registers": counts["vgpr_count"],
        "spills": counts["vgpr_spill_count"] + counts["sgpr_spill_count"],
        "packed_rounding": 0,
        "matrix": len(re.findall(r"^\tv_mfma_", text, re.MULTILINE)),
        "narrow": len(re.findall(narrow, text, re.MULTILINE)),
        # bits 0 and 1: keep denormal inputs and results
        "keeps_denormals": re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text) is not None,
    }


def _loops(instructions: Sequence[_Instruction]) -> list[Sequence[_Instruction]]:
    """The bodies of loops that hold a 128-bit store."""
    bodies = [
        instructions[step.jump : position + 1]
        for position, step in enumerate(instructions)
        if step.jump is not None and step.jump <= position
    ]
    return [body for body in bodies if any(step.store for step in body)]


def _full_tile_path(instructions: Sequence[_Instruction]) -> tuple[int, int, int]:
    """128-bit loads, 128-bit stores and instructions on the full tile's way from entry to exit.

    Of all ways, loops walked once, it is the shortest of those with the fewest stores but not none,
    and of these the most loads: compilers put versions of a loop, or the two signs of λ for AMD,
    one after the other, behind conditions that only one of them meets.
    """
    # for each instruction: (loads, stores) from here to the exit → fewest instructions; None while
    # the walk is below it
    ways: dict[int, dict[tuple[int, int], int] | None] = {}
    walk = [0]
    while walk:
        position = walk[-1]
        step = instructions[position]
        follow = [step.jump] if step.jump is not None else []
        if step.falls and position + 1 < len(instructions):
            follow.append(position + 1)
        if position not in ways:
            ways[position] = None
            walk += [to for to in follow if to not in ways]
            continue
        walk.pop()
        if ways[position] is not None:
            continue
        # a way that is still open leads back to a loop's head; an exit that only some threads take
        # counts where others have none
        after = [way for way in map(ways.get, follow) if way]
        if step.leaves and not after:
            after = [{(0, 0): 0}]
        fewest: dict[tuple[int, int], int] = {}
        for loads, stores, length in (
            (*key, length) for way in after for key, length in way.items()
        ):
            key = (loads + step.load, stores + step.store)
            fewest[key] = min(length + 1, fewest.get(key, length + 1))
        ways[position] = fewest
    whole = ways[0] or {}
    stored = any(stores for _, stores in whole)
    loads, stores = max(
        (key for key in whole if key[1] or not stored), key=lambda key: (-key[1], key[0])
    )
    return loads, stores, whole[loads, stores]


def main() -> None:
    print(
        f"triton {triton.__version__}; el: weight, 64-bit word for checksum, entry of an index"
        " list, bit of a bitmap"
    )
    print(
        f"{'kernel':32} target   128-bit ld/st  bytes/el  instr/el  loop/el   ALU/el  registers"
        "  spills  bf16x2"
    )
    for kernel in kernels():
        for target in TARGETS:
            row = compile_for(kernel, target)
            print(
                f"{row.kernel:32} {target:8} {row.wide_loads:>10}/{row.wide_stores}"
                f" {row.bytes_per_element:9.2f} {row.instructions_per_element:9.1f}"
                f" {row.loop_per_element:8.1f} {row.alu_per_element:8.1f}"
                f" {row.registers:10} {row.spills:7} {row.packed_rounding:7}"
            )


if __name__ == "__main__":
    main()

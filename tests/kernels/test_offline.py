"""The static gate: what compilers make of every kernel, for every target, without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from pa_kernels import offline
from pa_kernels.tiles import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")

REGISTERS = {
    "dense": {"cuda": 40, "hip": 64},
    "stochastic": {"cuda": 56, "hip": 72},
    "recorded dense": {"cuda": 112, "hip": 160},
    "recorded stochastic": {"cuda": 128, "hip": 184},
    "checksum": {"cuda": 48, "hip": 64},
    "sparse": {"cuda": 64, "hip": 72},
    "packed": {"cuda": 80, "hip": 136},
}
"""At 40 an SM still holds 48 warps, at 48 40, at 56 36, at 64 32, at 80 24; at 64 a SIMD of a CDNA
3 unit holds its 8 waves, at 72 7.
Recorded dense switches hold 32 weights a thread: at 112 registers an SM has 18 warps, each thread
with 128 bytes of loads in flight."""

VERSION = tuple(int(part) for part in offline.triton.__version__.split(".")[:2])
if VERSION >= (3, 7):
    # of an index list 76 to 80 where 3.6 allots 61 to 72, for the same accesses and no more
    # instructions: 6 waves a SIMD for 7, of a kernel that waits for scattered stores
    REGISTERS["sparse"]["hip"] = 80
    # 188 where 3.6 allots 176 to 184: 2 waves a SIMD with either
    REGISTERS["recorded stochastic"]["hip"] = 192

INSTRUCTIONS = {
    "dense": 24.0,
    "stochastic": 40.0,
    "recorded dense": 40.0,
    "recorded stochastic": 58.0,
    "checksum": 27.0,
    "sparse": 64.0,
    "packed": 104.0,
}
"""Per weight, per 64-bit word, per entry or bit: an H200 at full bandwidth has about 34 for a bf16
weight switched, 54 for a word read, and over 400 for an entry of an index list, whose store touches
a sector of its own. Of `stochastic`, 11 are the hash. A packed weight with a code of 16 bits takes
more than there are; here all that a tile does once is counted on one block, LOOPS has the loop
alone."""

if VERSION >= (3, 7):
    # on gfx942 41.4 of a mix of dtypes where 3.6 takes 39.5, for the same accesses
    INSTRUCTIONS["recorded dense"] = 42.0

LOOPS = {
    (8, "size"): (40.0, 16.0, 80),
    (16, "size"): (88.0, 39.0, 80),
    (8, "speed"): (18.0, 7.0, 72),
}
"""Of packed kernels by width and layout, instructions a weight in the loop, those of NVIDIA's ALU,
and registers there. While a dense switch moves 6 bytes a weight, an H200 has 41 to 46 and 20 to
23."""


ALL_BF16 = (offline.BF16,) * 3

STREAMS = [
    kernel
    for kernel in offline.kernels()
    if kernel.function is not offline.lowrank_triton.lowrank_kernel
]


def without_linker() -> str:
    """Why nothing can be made for AMD here, or "": Triton 3.4 has no linker of its own."""
    from triton.backends.amd.compiler import HIPBackend

    try:
        getattr(HIPBackend, "path_to_rocm_lld", str)()
    except Exception as why:
        return str(why)
    return ""


WITHOUT_LINKER = without_linker()


def on_targets(
    kernels: Sequence[Any], quick: Mapping[str, Collection[Any]], elsewhere: Collection[Any]
) -> list[Any]:
    """(kernel, target), all of them; slow tests but for those that are `quick` on their target, or
    on one that is not named, `elsewhere`."""
    return [
        pytest.param(
            kernel,
            target,
            marks=[
                pytest.mark.skipif(
                    target == "gfx942" and WITHOUT_LINKER != "", reason=WITHOUT_LINKER
                ),
                *([] if kernel in quick.get(target, elsewhere) else [pytest.mark.slow]),
            ],
        )
        for kernel in kernels
        for target in offline.TARGETS
    ]


def last_of_each(kernels: Sequence[offline.Kernel], *names: str) -> list[offline.Kernel]:
    """Of kernels of one function and of the same constants of these `names`, the last."""
    return list(
        {
            (kernel.function, *map(kernel.constants.get, names)): kernel for kernel in kernels
        }.values()
    )


FIRSTS = [
    kernel
    for kernel in last_of_each(STREAMS[::-1], "IS_STOCHASTIC", "RECORDS")
    if kernel.constants.get("IS_STOCHASTIC") == kernel.constants.get("RECORDS")
]
"""One of each kernel function, of bf16 where it has dtypes: of the dense one that with least in it
and that with most."""

KINDS = last_of_each(STREAMS[::-1], "IS_STOCHASTIC", "RECORDS", "WIDTH", "STEPS")
"""One of all that changes a function's code beside dtypes, of bf16."""

QUICK = {
    # of the dense one fp32, and the most mixed, too
    "sm_90": [*KINDS, *(offline.dense(*offline.DENSE_KINDS[k]) for k in (2, 6))],
    "gfx942": FIRSTS,
    # its loops are left by calls
    "sm_80": [offline.dense(ALL_BF16), offline.packed(offline.BF16, 8)],
}
"""By target. Half a second to two each, where Triton has not kept what it compiled."""


@pytest.mark.parametrize(
    ("kernel", "target"),
    on_targets(STREAMS, QUICK, [offline.dense(ALL_BF16)]),
    ids=lambda value: getattr(value, "name", value),
)
def test_gate(kernel: offline.Kernel, target: str) -> None:
    made = offline.compile_for(kernel, target)
    backend = offline.TARGETS[target].backend
    # every byte of a full tile moves in a 128-bit access: a narrower one would be missing from this
    # sum
    assert made.bytes_per_element == kernel.bytes_per_element
    assert made.spills == 0
    assert made.keeps_denormals
    first, second, *_ = *kernel.name.split(), ""
    op = f"{first} {second}" if first == "recorded" else first
    assert made.registers <= REGISTERS[op][backend]
    assert made.instructions_per_element <= INSTRUCTIONS[op]
    rounds_to_bf16 = offline.dense_triton.tl.bfloat16 in (
        kernel.constants.get("OUT"),
        kernel.constants.get("INTERMEDIATE"),
    )
    if backend == "cuda" and rounds_to_bf16 and op == "dense":
        assert made.packed_rounding > 0
    if op == "packed":
        layout = "speed" if kernel.constants["STEPS"] else "size"
        instructions, alu, registers = LOOPS[kernel.constants["WIDTH"], layout]
        assert 0 < made.loop_per_element <= instructions
        if backend == "cuda":
            assert 0 < made.alu_per_element <= alu
            assert made.registers <= registers


PRODUCT_REGISTERS = {("cuda", 2): 168, ("cuda", 4): 224, ("hip", 2): 192, ("hip", 4): 192}
"""By backend and bytes of a factor. Where all is 16-bit, 128: two programs share an SM; from 129 to
255 one does, so that the 160 of Triton 3.9 cost as much as the 150 of 3.6."""


def product_bytes(kernel: offline.Kernel, base: torch.dtype, factor: torch.dtype) -> list[int]:
    """Bytes of a tile's base, and of its factors for each of the steps that may be on their way
    before the loop turns."""
    shape = kernel.constants
    step = (shape["ROWS"] + shape["COLUMNS"]) * shape["STEP"] * factor.itemsize
    return [kernel.launch.block * base.itemsize + steps * step for steps in (2, 3, 4)]


@pytest.mark.parametrize(
    ("kind", "target"),
    on_targets(
        offline.LOWRANK_KINDS,
        # bf16 and fp32, and where accesses are masked
        {
            "sm_90": [offline.LOWRANK_KINDS[k] for k in (0, 2, 6)],
            "gfx942": offline.LOWRANK_KINDS[:3:2],
        },
        offline.LOWRANK_KINDS[:1],
    ),
    ids=lambda value: value if isinstance(value, str) else offline.lowrank(*value).name,
)
def test_gate_of_products(kind: tuple[Any, ...], target: str) -> None:
    kernel = offline.lowrank(*kind)
    (out, base, factor), intermediate, full = kind
    made = offline.compile_for(kernel, target)
    backend = offline.TARGETS[target].backend
    assert made.spills == 0
    assert made.keeps_denormals
    # fp32 factors keep their 24 bits: no matrix unit of NVIDIA's multiplies these
    assert (made.matrix > 0) == (factor.itemsize == 2 or backend == "hip")
    if backend == "cuda" and offline.BF16 in (out, intermediate):
        assert made.packed_rounding > 0
    if not full:
        return
    narrow = out.itemsize == base.itemsize == factor.itemsize == 2
    assert made.registers <= (128 if narrow else PRODUCT_REGISTERS[backend, factor.itemsize])
    assert made.narrow == 0
    assert made.wide_loads * 16 * kernel.launch.threads in product_bytes(kernel, base, factor)
    # AMD's matrix layout leaves 4 neighbours in a lane: 64-bit stores of 16-bit weights
    stored = 0 if backend == "hip" and out.itemsize == 2 else kernel.launch.block * out.itemsize
    assert made.wide_stores * 16 * kernel.launch.threads == stored


def test_the_gate_notices_a_product_whose_factors_are_read_in_pieces() -> None:
    # 512 threads share 2 KB of U: 32 bits each
    small = offline.lowrank(ALL_BF16, launch=offline.Launch(block=4096, threads=512))
    made = offline.compile_for(small, "sm_90")
    assert made.wide_loads * 16 * 512 not in product_bytes(small, offline.BF16, offline.BF16)


def test_two_products_of_16_bit_share_a_multiprocessor_because_their_launch_asks_for_it() -> None:
    assert all(
        (offline.lowrank(*kind).options.get("maxnreg") == 128)
        == (kind[2] and {dtype.itemsize for dtype in kind[0]} == {2})
        for kind in offline.LOWRANK_KINDS
    )


def test_the_gate_notices_a_launch_that_narrows_accesses() -> None:
    # 4 elements a thread of a 16-bit dtype are 64 bits
    narrow = offline.dense(ALL_BF16, launch=offline.Launch(block=1024, threads=256))
    made = offline.compile_for(narrow, "sm_90")
    assert made.bytes_per_element < narrow.bytes_per_element


def test_the_gate_notices_a_launch_that_needs_more_registers() -> None:
    fat = offline.dense((offline.FP32,) * 3, launch=offline.Launch(block=8192, threads=128))
    assert offline.compile_for(fat, "sm_90").registers > REGISTERS["dense"]["cuda"]


def test_the_table_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "kernels", lambda: [offline.checksum()])
    for target in ("sm_80", "sm_100", *(["gfx942"] if WITHOUT_LINKER else [])):
        monkeypatch.delitem(offline.TARGETS, target)
    offline.main()
    printed = capsys.readouterr().out
    assert all(target in printed for target in offline.TARGETS)


def test_the_gate_notices_an_index_list_whose_vectors_are_cut() -> None:
    # a mask that ends inside a vector breaks its load into single entries
    cut = offline.sparse("index", ALL_BF16)
    made = offline.compile_for(replace(cut, constants={**cut.constants, "VECTOR": 4}), "sm_90")
    assert made.bytes_per_element < cut.bytes_per_element


def test_a_path_through_a_loop_whose_exit_stands_before_its_body_is_found() -> None:
    def step(
        load: bool = False, jump: int | None = None, falls: bool = True, leaves: bool = False
    ) -> offline._Instruction:
        return offline._Instruction(load, False, jump, falls, leaves)

    # 0 jumps to the body 3; the body loads and jumps back to 1, which leaves the loop or falls into
    # the body again
    program = [
        step(jump=3, falls=False),
        step(jump=5),
        step(),
        step(load=True),
        step(jump=1, falls=False),
        step(leaves=True, falls=False),
    ]
    assert offline._full_tile_path(program) == (1, 0, 5)

"""What a run on a GPU consists of: its stages, the tests that each depends on, and the calls that
they are shared among where a GPU is lent for minutes at a time."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.machine import commit


@dataclass(frozen=True)
class Planned:
    """One stage.

    Attributes:
        place: `module:function` in bench.gpu; imported late, because an environment variable has to
            come before.
        needs_s: about how many seconds it takes on an H200.
        tests: the groups of `TESTS` that must pass before it is begun.
    """

    place: str
    needs_s: int
    tests: tuple[str, ...] = ()

    @property
    def limit_s(self) -> int:
        """Seconds after which it is stopped: a kernel that hangs must not cost the others."""
        return 60 + 4 * self.needs_s


STAGES = {
    "ceilings": Planned("ceilings:ceilings", 30, ("dense",)),
    "lerp": Planned("lerp:lerp", 40, ("dense",)),
    "packed": Planned("packed:packed", 60, ("dense", "packed")),
    "host": Planned("host:host", 30, ("dense",)),
    "checksum": Planned("checksum:checksum", 20, ("dense",)),
    "recorded": Planned("recorded:recorded", 50, ("dense",)),
    "graph": Planned("graph:graph", 15, ("dense", "packed")),
    "sweep": Planned("sweep:sweep", 110, ("dense", "live")),
    "encode": Planned("encode:encode", 40, ("packed",)),
    "first": Planned("first_switch:first_switch", 60, ("dense",)),
    "sparse": Planned("sparse:sparse", 40, ("dense", "sparse")),
    "lowrank": Planned("lowrank:lowrank", 40, ("dense", "lowrank")),
    "stochastic": Planned("stochastic:stochastic", 30, ("dense",)),
    "ncu": Planned("tools:ncu", 90, ("dense", "packed")),
    "sanitize": Planned("tools:sanitize", 120),
    "vllm": Planned("vllm_tests:vllm", 300),
}
"""In order of importance. `ceilings` comes before all others: they are shares of it."""


@dataclass(frozen=True)
class Tests:
    """One group of the tests that are marked `gpu` or `triton`; a process of its own runs them, so
    that a fault of one kernel leaves the tests of the others alone.

    Attributes:
        paths: files, below tests.
        only: what pytest's `-k` chooses among them; compute-sanitizer's are a stage.
        needs_s: about how many seconds they take on an H200, compilation included: an estimate.
    """

    paths: tuple[str, ...]
    only: str
    needs_s: int = 60

    @property
    def limit_s(self) -> int:
        """Seconds after which they are stopped."""
        return 60 + 4 * self.needs_s


_BODIES = ("kernels/test_gpu.py", "kernels/test_triton.py")

TESTS = {
    "dense": Tests(_BODIES, "not sparse and not packed", 90),
    "packed": Tests(("kernels/test_gpu.py", "kernels/test_packed_triton.py"), "packed"),
    "sparse": Tests(_BODIES, "sparse"),
    "lowrank": Tests(("kernels/test_lowrank_gpu.py", "kernels/test_lowrank_triton.py"), "lowrank"),
    "live": Tests(
        ("test_conformance.py", "live/test_planner.py", "examples/test_programs.py"), "test"
    ),
}
"""`dense` has the checksums too, and whatever is not known by another name."""


def groups_of(names: Iterable[str]) -> list[str]:
    """The groups that the stages `names` depend on, each once, in order."""
    needed = {group for name in names for group in STAGES[name].tests}
    return [group for group in TESTS if group in needed]


@dataclass(frozen=True)
class Call:
    """One loan of a machine, ten minutes at most.

    Attributes:
        purpose: the question that it answers.
        stages: of `STAGES`.
        look_at: what decides about the next one.
        before: a command that comes first.
    """

    purpose: str
    stages: tuple[str, ...]
    look_at: str
    before: str = ""

    @property
    def needs_s(self) -> int:
        """Seconds of its tests and stages, `ceilings` included."""
        stages = {"ceilings", *self.stages}
        return sum(STAGES[name].needs_s for name in stages) + sum(
            TESTS[group].needs_s for group in groups_of(stages)
        )


MINUTES = 9.5
"""Of a call; ten are lent at a time."""

CALLS = (
    Call(
        "does it run, is it right, P1, P2, P4",
        ("lerp", "recorded", "host", "stochastic", "checksum", "first"),
        "EXERCISED; names of tests that failed; copy near 4.3 TB/s; the shipped launches beside the"
        " best ones; a recorded switch beside a plain one; pointers beside staged copies. A"
        " misaligned address: a hint that is false. Bits that differ: NaN and −0 first",
        "timeout 180 python3 -m bench.gpu.exercise && echo EXERCISED",
    ),
    Call(
        "P3, P12, low rank, counters",
        ("packed", "graph", "encode", "lowrank", "ncu"),
        "packed over dense beside the use of the alu pipe; registers; sectors a request",
    ),
    Call(
        "P6, sparse, sanitizers",
        ("sweep", "sparse", "sanitize"),
        "all else per λ, and where it goes; compute-sanitizer comes last",
    ),
    Call(
        "vLLM, where it is installed",
        ("vllm",),
        "answers equal those of unmodified vLLM on merged folders, or the first that differs; then"
        " CUDA graphs, two ranks, and the memory that key-value blocks get: docs/vllm.md",
    ),
)


def plan() -> Iterator[str]:
    """The lines that `--plan` prints: a command for each call, to be run in the repository's root
    on the machine with the GPU, and what to look at."""
    yield f"{len(CALLS)} calls of at most 10 minutes, each soon after the last: what was compiled"
    yield "stays. Rows are in $OUT as soon as they are measured. If only one call can be had: the"
    yield "first. A stage whose tests fail is not timed; to time it all the same, after a look at"
    yield "the tests: --only-time."
    for number, call in enumerate(CALLS, 1):
        yield f"\nCall {number}: {call.purpose} (about {call.needs_s} s)"
        asked = f"--out $OUT --only {','.join(call.stages)} --minutes {MINUTES:g}"
        yield from (
            "  export PYTHONUNBUFFERED=1 PYTHONPATH=.:kernels"
            f" PA_FAST_COMMIT={shlex.quote(commit())}",
            "  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv",
            *([f"  {call.before}"] if call.before else []),
            f'  make gpu GPU="{asked}" 2>&1 | tee $OUT/call-{number}.log',
            f"  Look at: {call.look_at}.",
        )

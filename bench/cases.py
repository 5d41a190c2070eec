"""What is timed, at which sizes and for which target: the one list that the suites and the report
draw on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pa_fast.throughput.harness import Way, timed

SIZES = ("tiny", "100m", "300m", "1b", "3b")
"""`PA_FAST_BENCH_SIZE`: tiny tries every benchmark out in seconds, 300m is the default, 1b is what
the README quotes."""


@dataclass(frozen=True)
class Target:
    """One promise about speed.

    Attributes:
        what: is done to what.
        goal: on a CPU, or anywhere; empty where a GPU alone can tell.
        gpu_goal: the part that needs a GPU.
    """

    what: str
    goal: str = ""
    gpu_goal: str = ""


TARGETS = {
    "P1": Target(
        "dense switch, 8B shapes",
        gpu_goal="≥ 97 % of a tuned 2-read-1-write stream, ≥ 100 % of device copy",
    ),
    "P2": Target(
        "dense switch, 8B shapes",
        gpu_goal=(
            "≥ 1.3 × `copy_` + `_foreach_lerp_`, ≥ 1.5 × `copy_(torch.lerp())`, ≥ 1.0 ×"
            " `torch.lerp(out=)` per tensor"
        ),
    ),
    "P3": Target(
        "packed switch, checksum included",
        gpu_goal=(
            "layout size: ≤ 1.1 × the dense time at ≤ 3.2 and 3.52 bytes per weight; speed: ≤ 0.95"
            " × at ≤ 3.3 and 3.7"
        ),
    ),
    "P4": Target("switch from host memory", gpu_goal="≥ 90 % of the pinned host→device copy rate"),
    "P5": Target("dense switch on a CPU", "≥ 95 % of one flat `torch.lerp(out=)`"),
    "P6": Target(
        "sweep of 11 λ, forward passes apart",
        "per λ ≤ 1/40 of mergekit + `from_pretrained`, ≤ 1/4 of its `merge_state_dicts` + `copy_`",
        "≤ 1 % of the run, ≤ 1.6 × the switch",
    ),
    "P7": Target(
        "merge to disk",
        "≤ 2 × `cp` and `sync`; whole process ≥ 4 × mergekit (5 × at 3B); processor ≤ 2.5 s a 10⁹"
        " weights; ≤ 300 MB",
    ),
    "P8": Target(
        "`pa-fast inspect`, 70B shapes, whole process", "< 1 s, without torch or tensor data"
    ),
    "P9": Target("load to first λ", "≤ 1.5 × reading both sides into memory once"),
    "P10": Target(
        "lm-eval from the second λ, 2,000 items", "overhead ≤ 2 % of a `simple_evaluate` call's"
    ),
    "P11": Target("icl with shared prefix, 8 shots, 4 answers", "≥ 3 × the plain path"),
    "P12": Target(
        "packed encoding, both ends proven",
        "≥ 0.1 × the rate of reading both sides",
        "≥ 0.5 × the rate of reading",
    ),
    "P13": Target("start", "`pa-fast --help` < 0.5 s; `import pa_fast` without torch"),
    "P14": Target(
        "vLLM engine, 100 M weights, CPU",
        "switch with cache reset ≤ 50 ms beside the bytes; requests a second ≥ 3 × the transformers"
        " engine",
    ),
}


@dataclass(frozen=True)
class Case:
    """One op or job.

    Attributes:
        target: its row, or "" for what is good to know.
        unit: what `sizes` counts.
        sizes: one for each of `SIZES`.
        dtypes: of the weights; each is timed on its own.
        rounds: unless `PA_FAST_BENCH_ROUNDS` says otherwise.
    """

    target: str
    unit: str
    sizes: tuple[Any, Any, Any, Any, Any]
    dtypes: tuple[str, ...] = ("bfloat16",)
    rounds: int = 7

    @property
    def size(self) -> Any:
        """Of this run."""
        return self.sizes[SIZES.index(requested_size())]

    @property
    def goal(self) -> str:
        return TARGETS[self.target].goal if self.target else ""

    def time(self, *ways: Way, **options: Any) -> dict[str, Way]:
        """Time `ways` in turn, in the rounds of this run."""
        return timed(ways, self.rounds_here, **options)

    @property
    def rounds_here(self) -> int:
        """Of this run."""
        return int(os.environ.get("PA_FAST_BENCH_ROUNDS", self.rounds))


FLOATS = ("bfloat16", "float16", "float32")

OPS = {
    "lerp": Case("P5", "layers of a 1B model", (1, 2, 5, 10, 10), FLOATS, rounds=11),
    "checksum": Case("", "layers of a 1B model", (1, 2, 5, 10, 10), rounds=11),
    "proof": Case("P6", "layers of a 1B model", (1, 2, 5, 21, 21), rounds=9),
    "packed": Case("", "pair", ("tiny", "100m", "100m", "300m", "1b")),
    "sparse": Case("", "matrices of 2048 × 5632", (1, 2, 8, 8, 8)),
    "lowrank": Case("", "matrices of 2048 × 5632", (1, 2, 8, 8, 8)),
}

JOBS = {
    "driver": Case("", "λ", ((10, 50, 200), *((10, 1000, 10000),) * 4), rounds=3),
    "encode": Case("P12", "pair", ("tiny", "100m", "100m", "300m", "1b"), rounds=5),
    "icl": Case("P11", "items", (2, 4, 8, 24, 100), ("float32",), rounds=3),
    "inspect": Case("P8", "pair", ("70B shapes",) * 5),
    "lm-eval": Case("P10", "documents", (40, 400, 2000, 2000, 2000), rounds=3),
    "load": Case("P9", "pair", SIZES, rounds=5),
    "merge": Case("P7", "pair", SIZES, rounds=5),
    "start": Case("P13", "process", ("",) * 5),
    "sweep": Case("P6", "pair", SIZES, rounds=5),
    "vllm": Case(
        "P14",
        "pair, prompts",
        (("tiny", 4), *(("100m", count) for count in (8, 16, 48, 48))),
        rounds=3,
    ),
    "workers": Case("", "million additions a point", (1, 8, 8, 8, 8), rounds=3),
}


def requested_size() -> str:
    """`PA_FAST_BENCH_SIZE`, or 300m."""
    size = os.environ.get("PA_FAST_BENCH_SIZE", "300m")
    if size not in SIZES:
        raise ValueError(f"PA_FAST_BENCH_SIZE={size} is not known: write one of {', '.join(SIZES)}")
    return size

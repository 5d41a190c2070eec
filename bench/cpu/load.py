"""From two folders to the first λ (P9), against reading both checkpoints once into memory; warm
cache."""

from __future__ import annotations

from typing import Any

import pa_fast
from bench.cases import JOBS
from bench.run import Run
from bench.synthetic import read_into_memory, weight_count, write_pair
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.throughput.harness import Way, format_large

CASE = JOBS["load"]


def load(run: Run) -> None:
    base, instruct = write_pair(run.folder, CASE.size)
    held: list[pa_fast.LambdaModel] = []

    def read() -> None:
        with Checkpoint.open(base) as one, Checkpoint.open(instruct) as other:
            read_into_memory(one, other)

    def loaded(**options: Any) -> pa_fast.LambdaModel:
        held.append(pa_fast.load(base, instruct, device="cpu", **options))
        return held[-1]

    def close(name: str = "") -> None:
        while held:
            held.pop().close()

    loaded().set_lambda(0.3)
    held[0].weights.verify()
    close()
    with Checkpoint.open(base) as one:
        count = weight_count(one)
    ours = Way("load", loaded)  # its first λ, 0, is written when it returns
    ways = CASE.time(
        Way("read both sides", read, moved_bytes=4 * count),
        ours,
        ours.repeated,
        Way("load, set_lambda(0.3)", lambda: loaded().set_lambda(0.3)),
        Way("load without the endpoint check", lambda: loaded(endpoint_check=False)),
        after=close,
    )
    floor, whole, *_, unchecked = (way.median_s for way in ways.values())
    run.record(
        CASE.target,
        f"load to first λ, {format_large(count)} bf16 weights",
        ways.values(),
        "read both sides",
        goal=CASE.goal,
        headline=(
            f"{whole / floor:.2f} × reading both sides; {unchecked / floor:.2f} × without the"
            " endpoint check"
        ),
    )

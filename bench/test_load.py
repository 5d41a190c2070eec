"""From two folders to the first λ (P9), against reading both checkpoints once into memory; warm
cache."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pa_fast
from bench.cases import JOBS
from bench.reading import read_into_memory, weights
from bench.synthetic import write_pair
from bench.table import counted, record, timed
from pa_fast.checkpoint.reader import Checkpoint

CASE = JOBS["load"]


def test_load(benchmark: Any, tmp_path: pathlib.Path) -> None:
    base, instruct = write_pair(tmp_path, CASE.size)
    held: list[pa_fast.LambdaModel] = []

    def read() -> None:
        with Checkpoint.open(base) as one, Checkpoint.open(instruct) as other:
            read_into_memory(one, other)

    def load(**options: Any) -> pa_fast.LambdaModel:
        held.append(pa_fast.load(base, instruct, device="cpu", **options))
        return held[-1]

    def close() -> None:
        while held:
            held.pop().close()

    load().set_lambda(0.3)
    assert held[0].weights.verify(), "wrong bits: no speed"
    close()
    ways: dict[str, Callable[[], object]] = {
        "read both sides": read,
        "load": load,  # its first λ, 0, is written when it returns
        "load, again": load,
        "load, set_lambda(0.3)": lambda: load().set_lambda(0.3),
        "load without the endpoint check": lambda: load(endpoint_check=False),
    }
    with Checkpoint.open(base) as one:
        count = weights(one)
    floor, loaded, again, further, unchecked = timed(
        ways, CASE.rounds_here, {"read both sides": 4 * count}, after=close
    )
    record(
        benchmark,
        CASE.target,
        f"load to first λ, {counted(count)} bf16 weights",
        [floor, loaded, again, further, unchecked],
        against=floor.name,
        goal=CASE.goal,
        noise=(loaded.name, again.name),
        headline=(
            f"{loaded.median_s / floor.median_s:.2f} × reading both sides; "
            f"{unchecked.median_s / floor.median_s:.2f} × without the endpoint check"
        ),
    )

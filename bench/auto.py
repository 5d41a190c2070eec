"""`--lambdas auto` on a random pair of 110 M weights, whose accuracy has its optimum at a λ that is
planted: λ evaluated, and points lost at the λ that is chosen.

    python -m bench.auto [--seeds 20] [--items 704,1000,5000] [--gain 5]

What is evaluated is read from the live weights: an item is right or wrong at the λ that they act
like, `effective_lambda`, not at the one that was asked for. Items are noisy as those of the demo
pair, see `tests.stats.simulate`.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import pa_fast
from bench.synthetic import pair_of
from pa_fast.base import Engine, Evaluator, Item, Score, complete
from tests.stats.simulate import Sweeps, grid, peaked

LATTICE = grid(51)
"""λ of which items are drawn; `auto` asks for no others."""
DELTA = 0.2
"""Size of the delta, ‖I − B‖ / ‖B‖. With a tenth of it, rounding to bf16 moves λ by up to 0.018, a
step of the lattice."""


class Planted(Evaluator):
    """Right or wrong answers of `n` items, `gain` points better at λ = `peak` than at 1."""

    name, higher_is_better = "planted", True

    def __init__(self, seed: int, n: int, gain: float):
        rng = np.random.Generator(np.random.PCG64(seed))
        self.peak = float(rng.uniform(0.3, 0.7))
        self.identity: Mapping[str, Any] = {"seed": seed, "n": n, "gain": gain}
        self._shape = peaked(gain / 100, self.peak)
        self._right = Sweeps(LATTICE, self._shape).draw(rng, n).y

    def lost(self, lam: float) -> float:
        """Return how many points below the optimum the true accuracy at λ is."""
        best, there = self._shape(np.array([self.peak, lam]))
        return float(100 * (best - there))

    def __call__(self, engine: Engine) -> Score:
        acts_like = complete(engine).weights.effective_lambda()
        place = round(acts_like * 50)
        assert abs(acts_like - LATTICE[place]) < 0.005, f"live weights act like λ = {acts_like}"
        right = self._right[:, place]
        items = [Item(str(number), "all", float(one)) for number, one in enumerate(right)]
        return Score(float(right.mean()), "accuracy", len(items), items)


@dataclass(frozen=True)
class Found:
    """One sweep: `used` is the number of λ evaluated, `chosen` the one to use, `lost` in points."""

    peak: float
    chosen: float
    lost: float
    used: int
    seconds: float


def swept(engine: Engine, evaluator: Planted, out: str) -> Found:
    start = time.perf_counter()
    result = pa_fast.sweep(engine, "auto", evaluator, out, figure=False)
    if result.failures:
        raise RuntimeError(result.failures[0].error)
    chosen = float(result.answer().chosen)
    seconds = time.perf_counter() - start
    lost = evaluator.lost(chosen)
    return Found(evaluator.peak, chosen, lost, len(result.lambdas), seconds)


def measured(engine: Engine, n: int, gain: float, seeds: int) -> Iterator[Found]:
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as out:
            yield swept(engine, Planted(seed, n, gain), out)


HEAD = (
    *("items", "sweeps", "λ evaluated", "points lost, mean", "median", "most", "≤ 0.5"),
    *("λ off, median", "time, median"),
)


def row(n: int, found: list[Found]) -> str:
    lost, used = (np.array([getattr(one, name) for one in found]) for name in ("lost", "used"))
    seconds = np.array([one.seconds for one in found])
    apart = np.array([abs(one.peak - one.chosen) for one in found])
    cells = [f"{n:,}", f"{len(found)}", f"{used.mean():.1f} ({used.min()}–{used.max()})"]
    cells += [f"{lost.mean():.2f}", f"{np.median(lost):.2f}", f"{lost.max():.2f}"]
    cells += [
        f"{(lost <= 0.5).mean():.0%}",
        f"{np.median(apart):.2f}",
        f"{np.median(seconds):.1f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--items", default="704,1000,5000")
    parser.add_argument("--gain", type=float, default=5.0)
    parser.add_argument("--size", default="100m", help="of bench.synthetic.SIZES")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        pair_of(pathlib.Path(folder) / "pair", asked.size, DELTA) as (base, instruct),
    ):
        engine = pa_fast.load(base, instruct)
        print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
        for n in map(int, asked.items.split(",")):
            print(row(n, list(measured(engine, n, asked.gain, asked.seeds))), flush=True)


if __name__ == "__main__":
    main()

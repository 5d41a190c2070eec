"""A sweep on workers of one's own making: an engine and evaluators for each Ray actor, one run
folder.

python -m examples.ray_sweep runs/ray_sweep
"""

from __future__ import annotations

import pathlib
import sys

import pa_fast
import pa_fast.ray
from pa_fast.evals import build

DEMO = pathlib.Path(__file__).parent / "demo"


def make() -> tuple[pa_fast.Engine, list[pa_fast.Evaluator]]:
    """Called once in every worker; on a cluster with GPUs each worker has one of its own."""
    engine = pa_fast.load(DEMO / "pair" / "base", DEMO / "pair" / "instruct")
    return engine, [build(f"icl:{DEMO / 'fewshot.jsonl'},shots=2,sep=\\n,name=2-shot", limit=32)]


def main(out: str) -> pa_fast.SweepResult:
    result = pa_fast.ray.sweep(make, "0:1:0.25", out, workers=2)
    for row in result.rows:
        print(f"λ = {row.lam.key:4} {row.evaluator} {row.score:.4f} {row.unit}")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/ray_sweep")

"""Run folders for reports: planted curves, outputs, several tasks, costs, and names that are
hostile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pa_fast.base import Engine, Evaluator, Item, Score
from pa_fast.report.delta import DeltaSizes, PartSize
from pa_fast.sweep import sweep
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.schedule import Schedule
from tests.sweep.fakes import FakeEngine
from tests.sweep.planted import planted

HOSTILE = '<script>alert("x")</script>'


class Tasks(Evaluator):
    """A planted curve over several tasks, with what the model wrote; or a cost."""

    def __init__(
        self,
        name: str,
        shape: str = "peak +5",
        n: int = 2000,
        *,
        tasks: int = 4,
        cost: bool = False,
        seed: int = 0,
    ):
        self.name, self.higher_is_better = name, not cost
        self.identity: Mapping[str, Any] = {"shape": shape, "n": n, "seed": seed}
        self._tasks = tasks

    def __call__(self, engine: Engine) -> Score:
        lam = engine.weights.lam
        assert lam is not None
        right = planted(**self.identity).y[:, round(lam * 50)]
        scores = right if self.higher_is_better else 3 - right
        groups = [f"task {k % self._tasks}" for k in range(len(right))]
        items = [Item(str(k), groups[k], float(s)) for k, s in enumerate(scores)]
        outputs = "".join(
            json.dumps(
                {
                    "id": item.id,
                    "group": item.group,
                    "prompt": f"question {item.id} {HOSTILE}",
                    "output": f"answer at {lam:g} {HOSTILE}",
                    "score": item.score,
                }
            )
            + "\n"
            for item in items
        )
        means = [np.mean([i.score for i in items if i.group == g]) for g in sorted({*groups})]
        return Score(
            float(np.mean(means)),
            "accuracy" if self.higher_is_better else "nats",
            len(items),
            items,
            {"truncated": 0.25, "ties": 10.0},
            {"outputs.jsonl": outputs},
        )


def made(out: Path, *, shape: str = "peak +5", n: int = 2000, lambdas: str = "0:1:0.1") -> Path:
    """A run of three evaluators, one of them a cost, one with a hostile name."""
    evaluators = [
        Tasks("icl", shape, n),
        Tasks(f"follow {HOSTILE}", "monotone", n, seed=1),
        Tasks("loss", shape, n, cost=True, seed=2),
    ]
    sweep(FakeEngine(), Schedule.of(lambdas, "icl"), evaluators, out, figure=False)
    return out


def loaded(*folders: Path) -> list[SweepResult]:
    return [SweepResult.load(folder) for folder in folders]


def sized(out: Path, layers: int = 24) -> Path:
    """The run folder `out` with sizes of a delta, as `inspect --run` keeps them."""
    modules = [f"self_attn.{name}_proj" for name in "qkvo"]
    modules += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    inside = [
        PartSize(module, layer, 0.004 * 1.1**layer * (1 + row))
        for row, module in enumerate(modules)
        for layer in range(layers)
    ]
    outside = [
        PartSize(name, None, 0.01) for name in ("model.embed_tokens", "model.norm", "lm_head")
    ]
    sizes = DeltaSizes("base", "instruct", True, (*inside, *outside))
    (out / "pair.json").write_text(json.dumps({"format": 1, **asdict(sizes)}))
    return out

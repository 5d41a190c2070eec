"""What lm-eval costs beside the forward passes, at one more λ: our evaluator, and `simple_evaluate` on the same live model.

A 1 M model, one task of 2,000 documents with four options of six tokens and five shots. Overhead is wall time less the time
inside the model's forward.
"""

from __future__ import annotations

import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
from pa_fast.evals import build

DEMO = pathlib.Path(__file__).parents[1] / "examples" / "demo"
DOCUMENTS, SHOTS, BATCH, ROUNDS = 2000, 5, 32, 3
TASK = {
    "task": "b_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "train",
    "doc_to_text": "{{question}}>",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{options.index(answer)}}",
    "target_delimiter": "",
    "fewshot_delimiter": "\n",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def write_task(folder: pathlib.Path) -> dict[str, Any]:
    """The task's files in `folder`, and its configuration."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    files = {}
    for split, count in (("test", DOCUMENTS), ("train", 100)):
        rows = [{"question": word(), "options": [word() for _ in range(4)]} for _ in range(count)]
        files[split] = str(folder / f"{split}.jsonl")
        text = "".join(json.dumps({**row, "answer": draw.choice(row["options"])}) + "\n" for row in rows)
        pathlib.Path(files[split]).write_text(text, encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": files}}
    (folder / "b_choice.yaml").write_text(json.dumps(task), encoding="utf-8")
    return task


def test_lm_eval(benchmark: Any, capsys: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    task = write_task(tmp_path)
    lm = pa_fast.load(DEMO / "pair" / "base", DEMO / "pair" / "instruct", batch_size=BATCH)
    forward = _Clock(lm.model)
    stock = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=BATCH)
    kept = TaskManager(include_path=str(tmp_path))
    ours = build(f"lm-eval:b_choice,shots={SHOTS},include_path={tmp_path}")
    first = _timed(forward, lambda: ours(lm))

    def simply(manager: Any) -> Any:
        # a fresh copy: lm-eval writes into the configuration that it is given
        named = "b_choice" if manager else json.loads(json.dumps(task))
        found = simple_evaluate(stock, tasks=[named], num_fewshot=SHOTS, task_manager=manager)
        return found["results"]["b_choice"]["acc_norm,none"]

    ways: dict[str, Callable[[], Any]] = {
        "simple_evaluate": lambda: simply(None),
        "the same with a TaskManager that is kept": lambda: simply(kept),
        "our evaluator from the second λ": lambda: ours(lm).value,
    }
    overheads: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(ROUNDS):
        lm.set_lambda(0.3 * round_ + 0.2)
        said = set()
        for name, run in ways.items():
            _, overhead, value = _timed(forward, run)
            overheads[name].append(overhead)
            said.add(value)
        assert len(said) == 1, "other scores: no time is printed"
    medians = {name: statistics.median(values) for name, values in overheads.items()}
    whole = medians["simple_evaluate"]
    with capsys.disabled():
        print(f"\n{DOCUMENTS} documents, 4 options, {SHOTS} shots, batches of {BATCH}; overhead beside the forward passes:")
        for name, value in medians.items():
            print(f"  {name:42} {value:8.3f} s  {100 * value / whole:6.2f} %")
        print(f"  {'our evaluator at the first λ':42} {first[1]:8.3f} s; forward passes {first[0] - first[1]:.1f} s")
    benchmark.extra_info |= medians
    benchmark.pedantic(lambda: ours(lm), rounds=1)


class _Clock:
    """Seconds inside the forward of `model`."""

    def __init__(self, model: Any):
        self.spent = self._since = 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.spent += time.perf_counter() - self._since


def _timed(forward: _Clock, run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, seconds outside the model's forward, and what `run` returned."""
    start, before = time.perf_counter(), forward.spent
    value = run()
    wall = time.perf_counter() - start
    return wall, wall - (forward.spent - before), value

"""What lm-eval costs beside the forward passes, at one more λ: our evaluator, and `simple_evaluate`
on the same live model.

A 1 M model, one task of documents with four options of six tokens and five shots. Overhead is wall
time less the time inside the model's forward.
"""

from __future__ import annotations

import functools
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pa_fast
from bench.cases import JOBS
from bench.table import Way, record
from pa_fast.evals import build

DEMO = pathlib.Path(__file__).parents[1] / "examples" / "demo"
CASE, SHOTS, BATCH = JOBS["lm-eval"], 5, 32
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
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}


def write_task(folder: pathlib.Path) -> dict[str, Any]:
    """The task's files in `folder`, and its configuration."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    files = {}
    for split, count in (("test", CASE.size), ("train", 100)):
        rows = [{"question": word(), "options": [word() for _ in range(4)]} for _ in range(count)]
        files[split] = str(folder / f"{split}.jsonl")
        text = "".join(
            json.dumps({**row, "answer": draw.choice(row["options"])}) + "\n" for row in rows
        )
        pathlib.Path(files[split]).write_text(text, encoding="utf-8")
    task = {**TASK, "dataset_kwargs": {"data_files": files}}
    (folder / "b_choice.yaml").write_text(json.dumps(task), encoding="utf-8")
    return task


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Passes of so small a model on threads that wait for busy cores take ten times as long, and
    are not what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_lm_eval(benchmark: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    task = write_task(tmp_path)
    forward = _Clock(monkeypatch, LlamaForCausalLM)
    lm = pa_fast.load(
        DEMO / "pair" / "base", DEMO / "pair" / "instruct", device="cpu", batch_size=BATCH
    )
    assert type(lm.model) is LlamaForCausalLM
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
        "simple_evaluate, TaskManager kept": lambda: simply(kept),
        "from the second λ": lambda: ours(lm).value,
        "from the second λ, again": lambda: ours(lm).value,
    }
    overheads: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(CASE.rounds_here):
        lm.set_lambda(0.1 + 0.1 * round_)
        said = set()
        for name, run in ways.items():
            _, overhead, value = _timed(forward, run)
            overheads[name].append(overhead)
            said.add(value)
        assert len(said) == 1, "other scores: no speed"
    whole, managed, second, again = (
        Way(name, tuple(seconds)) for name, seconds in overheads.items()
    )
    once = Way(
        "the first λ",
        (first[1],),
        note=f"once; its forward passes take {first[0] - first[1]:.1f} s beside it",
    )
    record(
        benchmark,
        CASE.target,
        f"lm-eval, {CASE.size:,} items of 4 answers, {SHOTS} shots: seconds beside the forward"
        " passes",
        [whole, managed, second, again, once],
        against=whole.name,
        goal=CASE.goal,
        noise=(second.name, again.name),
        headline=f"{second.median_s / whole.median_s:.1%} of a `simple_evaluate` call's",
    )


class _Clock:
    """Seconds inside the forward of every model of `kind`: on the class, for a live model takes no
    hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type):
        self.spent = 0.0
        monkeypatch.setattr(kind, "forward", self._around(kind.forward))  # type: ignore[attr-defined]

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def clocked(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return forward(*given, **named)
            finally:
                self.spent += time.perf_counter() - began

        return clocked


def _timed(forward: _Clock, run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, seconds outside the model's forward, and what `run` returned."""
    start, before = time.perf_counter(), forward.spent
    value = run()
    wall = time.perf_counter() - start
    return wall, wall - (forward.spent - before), value

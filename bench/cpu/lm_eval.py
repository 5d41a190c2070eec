"""What lm-eval costs beside the forward passes, at one more λ: our evaluator, and `simple_evaluate`
on the same live model.

A 1 M model, one task of documents with four options of six tokens and five shots. Overhead is wall
time less the time inside the model's forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

import pa_fast
from bench.cases import JOBS
from bench.machine import ROOT
from bench.run import Run, Skip
from pa_fast.evals import build
from pa_fast.throughput.harness import Sample, Way, by_itself, by_wall, require_bits

DEMO = ROOT / "examples" / "demo"
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


def lm_eval(run: Run) -> None:
    if not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))):
        raise Skip("lm-eval is not installed")
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with (
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", run.folder / "datasets"),
        _one_thread(),
        _forward_clock() as forward,
        contextlib.redirect_stderr(io.StringIO()),  # bars
    ):
        task = write_task(run.folder)
        pair = DEMO / "pair"
        lm = pa_fast.load(pair / "base", pair / "instruct", device="cpu", batch_size=BATCH)
        stock = HFLM(
            pretrained=lm.model,
            tokenizer=lm.tokenizer,
            batch_size=BATCH,
            softmax_dtype="float32",  # as ours
        )
        kept = TaskManager(include_path=str(run.folder))
        text = f"lm-eval:b_choice,shots={SHOTS},include_path={run.folder}"
        evaluator, sampled = build(f"{text},log_samples=false"), build(text)
        scores: set[float] = set()

        def simply(manager: Any) -> float:
            # a fresh copy: lm-eval writes into the configuration that it is given
            named = "b_choice" if manager else json.loads(json.dumps(task))
            found = simple_evaluate(stock, tasks=[named], num_fewshot=SHOTS, task_manager=manager)
            return float(found["results"]["b_choice"]["acc_norm,none"])

        def beside_forward(score: Callable[[], float]) -> Sample:
            before = forward.spent_s
            sample = by_wall(lambda: scores.add(score()))
            return replace(sample, wall_s=sample.wall_s - (forward.spent_s - before), cpu_s=None)

        def way(name: str, score: Callable[[], float]) -> Way:
            return Way(name, lambda: beside_forward(score))

        ours = way("from the second λ", lambda: evaluator(lm).value)
        calls, lams = itertools.count(1), itertools.cycle(0.1 * k for k in range(1, 10))

        def after(name: str) -> None:
            if next(calls) % 5 == 0:  # a round is done
                require_bits(len(scores) == 1, f"other scores: {scores}")
                scores.clear()
                lm.set_lambda(next(lams))

        began = time.perf_counter()
        first = beside_forward(lambda: evaluator(lm).value).wall_s
        passes_s = time.perf_counter() - began - first
        sampled(lm)
        scores.clear()
        lm.set_lambda(next(lams))
        ways = CASE.time(
            way("simple_evaluate", lambda: simply(None)),
            way("simple_evaluate, TaskManager kept", lambda: simply(kept)),
            ours,
            way("from the second λ, samples kept", lambda: sampled(lm).value),
            ours.repeated,
            measure=by_itself,
            warm=0,
            after=after,
        )
    note = f"once; its forward passes take {passes_s:.1f} s beside it"
    share = ways[ours.name].median_s / ways["simple_evaluate"].median_s
    run.record(
        CASE.target,
        f"lm-eval, {CASE.size:,} items of 4 answers, {SHOTS} shots: seconds beside the forward"
        " passes",
        [*ways.values(), Way("the first λ", seconds=(first,), note=note)],
        "simple_evaluate",
        goal=CASE.goal,
        headline=f"{share:.1%} of a `simple_evaluate` call's",
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Passes of so small a model on threads that wait for busy cores take ten times as long, and
    are not what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Clock:
    spent_s = 0.0


@contextlib.contextmanager
def _forward_clock() -> Iterator[_Clock]:
    """Add up seconds inside the model's forward: of its class, for a live model takes no hooks."""
    from transformers import LlamaForCausalLM

    clock, forward = _Clock(), LlamaForCausalLM.forward

    @functools.wraps(forward)
    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return forward(*args, **options)
        finally:
            clock.spent_s += time.perf_counter() - began

    with mock.patch.object(LlamaForCausalLM, "forward", timed):
        yield clock

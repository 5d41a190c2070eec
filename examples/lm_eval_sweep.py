"""A λ sweep inside a pipeline of one's own that calls lm-eval: `python -m examples.lm_eval_sweep
[LAMBDAS]`.

The pair, the tokenizer's batches and the task's requests are loaded, encoded and built once; what a
λ costs is a switch of the weights in place and the forward passes. Needs `pip install
'pa_fast[eval]'`, and is run from the repository root.
"""

from __future__ import annotations

import pathlib
import sys

import pa_fast
from pa_fast.lm_eval import PaFastLM, build_once

DEMO = pathlib.Path(__file__).with_name("demo")
TASK = {  # any task of lm-eval's would do: TaskManager().load(["ifeval"])
    "task": "follow",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(DEMO / "requests.jsonl")}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "num_fewshot": 0,
}


def main(lambdas: str = "0:1:0.25", limit: int | None = None) -> dict[str, float]:
    """Exact match at each λ, by its key."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    lm = pa_fast.load(DEMO / "pair" / "base", DEMO / "pair" / "instruct", batch_size=32)
    harness = PaFastLM(lm, bars=False)
    tasks = build_once(TaskManager(include_defaults=False).load([TASK]))
    scores = {}
    for lam in pa_fast.lambdas(lambdas):
        lm.set_lambda(lam)
        results = evaluate(harness, tasks, limit=limit, bootstrap_iters=0, log_samples=False)
        scores[lam.key] = results["results"]["follow"]["exact_match,none"]
        print(f"λ = {lam.key:5} exact match {scores[lam.key]:.3f}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:2])

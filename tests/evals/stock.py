"""What lm-eval says by itself: a process that has done nothing else evaluates a merged folder with
its own HFLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def evaluated(lm: Any, tasks: Any, chat: bool) -> Any:
    from lm_eval.evaluator import evaluate

    return evaluate(
        lm,
        tasks,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


def loaded(folder: str, names: list[str], shots: int) -> Any:
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=folder, include_defaults=False).load(names)
    for task in tasks["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
    return tasks


def write(tasks: str, batch_size: int, folder: str) -> None:
    """FOLDER/stock.json: {case: results with samples}."""
    import datasets
    import torch
    from lm_eval.models.huggingface import HFLM

    from pa_fast.evals.lm_eval.tasks import plain_json
    from tests.evals.harness_tasks import CASES

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"
    lm = HFLM(pretrained=folder, device="cpu", batch_size=batch_size, softmax_dtype="float32")
    found = {case: evaluated(lm, loaded(tasks, *what[:2]), what[2]) for case, what in CASES.items()}
    (Path(folder) / "stock.json").write_text(plain_json(found), encoding="utf-8")

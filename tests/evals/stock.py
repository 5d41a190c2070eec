"""What lm-eval says by itself: processes that have done nothing else evaluate merged folders with
its own HFLM.

python -m tests.evals.stock TASKS BATCH_SIZE FOLDER…
    → FOLDER/stock.json: {case: results with samples}
"""

from __future__ import annotations

import multiprocessing
import sys
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
    from lm_eval.models.huggingface import HFLM

    from pa_fast.evals.lm_eval.tasks import plain_json
    from tests.evals.harness_tasks import CASES

    lm = HFLM(pretrained=folder, device="cpu", batch_size=batch_size, softmax_dtype="float32")
    found = {case: evaluated(lm, loaded(tasks, *what[:2]), what[2]) for case, what in CASES.items()}
    (Path(folder) / "stock.json").write_text(plain_json(found), encoding="utf-8")


def main(tasks: str, batch_size: str, *folders: str) -> None:
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401
    import torch

    torch.set_num_threads(1)
    # each folder has a process of its own, forked before anything is evaluated
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=write, args=(tasks, int(batch_size), folder)) for folder in folders
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main(*sys.argv[1:])

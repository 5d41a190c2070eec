"""lm-eval tasks whose requests are built once and asked at every λ."""

from __future__ import annotations

import copy
from typing import Any

from pa_fast.errors import EvaluatorError
from pa_fast.evals.lm_eval.mixed import mixed
from pa_fast.evals.lm_eval.templates import templates_kept

SEED = 1234
"""lm-eval's own seed for drawing shots."""

_Base: Any = object  # the task's own class, which `build_once` mixes in


class Once(_Base):
    """Builds requests at the first call, and as long as nothing that shapes them changes only clears their answers.

    Kept answers would be read again: lm-eval appends to them and its default filter takes the first. The shots are drawn
    anew, from the same seed, whenever requests are built: the generator would otherwise have moved on.

    Attributes:
        measured: what `process_results` said of each document in the latest call of `evaluate`, filter after filter.
    """

    shots_seed: int | None
    measured: list[dict[str, Any]]
    _shape: Any
    _docs: Any

    def build_all_requests(self, **options: Any) -> None:
        self.measured = []
        shape = (options, self.dump_config(), self.shots_seed)
        if self._shape == shape:
            for instance in self.instances:
                instance.resps.clear()
                instance.filtered_resps.clear()
            return
        self._shape = None
        super().set_fewshot_seed(self.shots_seed)
        with templates_kept():
            super().build_all_requests(**options)
        self._shape = shape

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        self.shots_seed = seed
        super().set_fewshot_seed(seed)

    def process_results(self, doc: Any, results: Any) -> Any:
        with templates_kept():
            metrics = super().process_results(doc, results)
        self.measured.append(metrics)
        return metrics

    def override_metric(self, metric_name: str) -> None:
        """Refuses `predict_only` of `simple_evaluate`."""
        raise EvaluatorError(
            f"lm-eval: predict_only would replace the metrics of `{self.task_name}` for all λ to come",
            "load the task again for it, and do not pass that to build_once",
        )

    @property
    def eval_docs(self) -> Any:
        """The documents, processed once where they are a data set; its rows are made anew whenever they are read."""
        from datasets import Dataset

        if self._docs is not None:
            return self._docs
        docs = super().eval_docs
        self._docs = docs if isinstance(docs, Dataset) else None
        return docs


def build_once(tasks: Any, seed: int = SEED) -> Any:
    """`tasks` as `TaskManager.load` returns them, with tasks that build their requests once.

    What shapes a request (options of `evaluate`, the task's configuration, the seed) may change: they are then built again.
    The given tasks share data, configuration and the generator of shots with the returned ones; use only those.

    Args:
        seed: draws the shots; `evaluate()` itself sets none, and every process would see others.
    """
    found = {}
    for name, task in tasks["tasks"].items():
        found[name] = once = mixed(Once, copy.copy(task))
        once._shape = once._docs = None
        once.measured = []
        once.set_fewshot_seed(seed)
    return {**tasks, "tasks": found}

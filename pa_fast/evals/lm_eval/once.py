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
    """Builds requests at the first call, and as long as nothing that shapes them changes only
    clears their answers.

    Kept answers would be read again: lm-eval appends to them and its default filter takes the
    first. The shots are drawn anew, from the same seed, whenever requests are built: the generator
    would otherwise have moved on.

    Attributes:
        measured: what `process_results` said of each document in the latest call of `evaluate`,
            filter after filter.
        tied: of documents with choices, whether different ones were equally likely, raw and per
            character; in the same order.
    """

    shots_seed: int | None
    measured: list[dict[str, Any]]
    tied: list[tuple[bool, bool]]
    _shape: Any
    _docs: Any

    def build_all_requests(self, **options: Any) -> None:
        self.measured = []
        self.tied = []
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
            if self.OUTPUT_TYPE == "multiple_choice":
                self.tied.append(_tied(self.doc_to_choice(doc), results))
        self.measured.append(metrics)
        return metrics

    def ties(self, key: str) -> int:
        """How many documents had equally likely choices in the metric `name,filter`, which counts
        only `acc_norm` per character."""
        metric, _, filter = key.partition(",")
        filters = list(self.instances[0].filtered_resps)
        count = len(self.tied) // len(filters)
        first = filters.index(filter) * count
        return sum(
            per_character if metric == "acc_norm" else raw
            for raw, per_character in self.tied[first : first + count]
        )

    def override_metric(self, metric_name: str) -> None:
        """Refuses `predict_only` of `simple_evaluate`."""
        raise EvaluatorError(
            f"lm-eval: predict_only would replace the metrics of `{self.task_name}` for all λ to"
            " come",
            "load the task again for it, and do not pass that to build_once",
        )

    @property
    def eval_docs(self) -> Any:
        """The documents, processed once where they are a data set; its rows are made anew whenever
        they are read."""
        from datasets import Dataset

        if self._docs is not None:
            return self._docs
        docs = super().eval_docs
        self._docs = docs if isinstance(docs, Dataset) else None
        return docs


def _tied(choices: list[str], results: Any) -> tuple[bool, bool]:
    """Whether the best log-likelihood belongs to different `choices`, raw and per character."""
    # more of them are unconditional ones
    nats = [float(result[0]) for result in results[: len(choices)]]
    best, most = max(nats), max(value / max(1, len(choice)) for value, choice in zip(nats, choices))
    raw = {choice for value, choice in zip(nats, choices) if value == best}
    weighed = {
        choice for value, choice in zip(nats, choices) if value / max(1, len(choice)) == most
    }
    return len(raw) > 1, len(weighed) > 1


def build_once(tasks: Any, seed: int = SEED) -> Any:
    """`tasks` as `TaskManager.load` returns them, with tasks that build their requests once.

    What shapes a request (options of `evaluate`, the task's configuration, the seed) may change:
    they are then built again. The given tasks share data, configuration and the generator of shots
    with the returned ones; use only those.

    Args:
        seed: draws the shots; `evaluate()` itself sets none, and every process would see others.
    """
    found = {}
    for name, task in tasks["tasks"].items():
        found[name] = once = mixed(Once, copy.copy(task))
        once._shape = once._docs = None
        once.measured, once.tied = [], []
        once.set_fewshot_seed(seed)
    return {**tasks, "tasks": found}

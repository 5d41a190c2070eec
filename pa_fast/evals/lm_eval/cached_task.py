"""lm-eval tasks whose requests are built once and scored at every λ."""

from __future__ import annotations

import copy
import functools
import hashlib
import pickle
from collections.abc import Callable
from typing import Any

from pa_fast.errors import EvaluatorError

SEED = 1234
"""lm-eval's own seed for drawing shots."""


class CachedTask:
    """A loaded lm-eval task that builds its requests at the first call of `build_all_requests`,
    and only clears their answers as long as nothing that shapes them changes.

    lm-eval appends answers to those of the request and its default filter takes the first, so old
    ones must go. The shots are drawn anew, from the same seed, whenever requests are built: the
    generator would otherwise have moved on. Everything that is not defined here is the task's own.

    Args:
        task: a task as `TaskManager.load` returns it; it keeps its configuration.
        seed: draws the shots.

    Attributes:
        measured: the metrics of each document in the latest call of `evaluate`, filter after
            filter.
        tied: for documents with choices, in the same order, whether different choices were equally
            likely: raw, and per character.
    """

    def __init__(self, task: Any, seed: int = SEED):
        self._task = task
        self._worker = _cached_copy(task)
        self._worker_config = task.dump_config()
        self._seed: int | None = seed
        self._shape: Any = None
        self.measured: list[dict[str, Any]] = []
        self.tied: list[tuple[bool, bool]] = []

    def __getattr__(self, name: str) -> Any:
        # not self._worker: copy and pickle look for attributes before there is one
        return getattr(object.__getattribute__(self, "_worker"), name)

    @property
    def config(self) -> Any:
        return self._task.config

    def get_config(self, key: str) -> Any:
        return self._task.get_config(key)

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        self._task.set_config(key, value, update)

    def dump_config(self) -> dict[str, Any]:
        return dict(self._task.dump_config())

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        self._seed = seed

    def override_metric(self, metric_name: str) -> None:
        """Refuse `predict_only` of `simple_evaluate`."""
        raise EvaluatorError(
            f"lm-eval: predict_only would replace the metrics of `{self.task_name}` for all λ to"
            " come",
            "load the task again for it, and do not pass that to build_once",
        )

    def build_all_requests(self, **options: Any) -> None:
        self.measured = []
        self.tied = []
        config = self.dump_config()
        shape = (options, config, self._seed)
        if self._shape == shape:
            for instance in self._worker.instances:
                instance.resps.clear()
                instance.filtered_resps.clear()
            return
        self._shape = None
        if self._worker_config != config:
            self._worker, self._worker_config = _cached_copy(self._task), config
        self._worker.set_fewshot_seed(self._seed)
        self._worker.build_all_requests(**options)
        self._shape = shape

    def process_results(self, doc: Any, results: Any) -> Any:
        metrics = self._worker.process_results(doc, results)
        if self._worker.OUTPUT_TYPE == "multiple_choice":
            self.tied.append(_ties(self._worker.doc_to_choice(doc), results))
        self.measured.append(metrics)
        return metrics

    def filters(self) -> list[str]:
        """Names of the filters that the latest call of `evaluate` applied."""
        return list(self._worker.instances[0].filtered_resps)

    def of_filter(self, values: list[Any], name: str) -> list[Any]:
        """Return the part of `measured` or `tied` that belongs to one filter: a value a
        document."""
        filters = self.filters()
        count = len(values) // len(filters)
        first = filters.index(name) * count
        return values[first : first + count]

    def tie_count(self, key: str) -> int:
        """Return the number of documents with equally likely choices in the metric `name,filter`;
        only `acc_norm` is per character."""
        metric, _, filter = key.partition(",")
        return sum(
            per_character if metric == "acc_norm" else raw
            for raw, per_character in self.of_filter(self.tied, filter)
        )


def build_once(tasks: Any, seed: int = SEED) -> Any:
    """Return `tasks`, as `TaskManager.load` returns them, with tasks that build their requests
    once.

    They build them again if what shapes a request changes: options of `evaluate`, the task's
    configuration, the seed. The given tasks share data, configuration and the generator of shots
    with the returned ones; use only the latter.

    Args:
        seed: draws the shots; `evaluate()` sets none, so that each process would draw others.

    Example:
        tasks = build_once(TaskManager().load(["piqa", "arc_easy"]))
        results = evaluate(PaFastLM(lm), tasks, bootstrap_iters=0)
    """
    return {
        **tasks,
        "tasks": {name: CachedTask(task, seed) for name, task in tasks["tasks"].items()},
    }


def _cached_copy(task: Any) -> Any:
    """Return a copy of `task` whose configuration has functions instead of templates, as lm-eval
    allows; these and `process_docs` cache their results.

    lm-eval compiles a template for every document at every λ, which takes longer than everything
    else that it does beside the forward passes, and processes the documents whenever they are read.
    """
    from lm_eval.api.task import ConfigurableTask

    worker = copy.copy(task)
    if not isinstance(task, ConfigurableTask):
        return worker
    worker._config = config = copy.copy(task.config)
    if config.process_docs is not None:
        config.process_docs = _cached_process(config.process_docs)
    worker.fewshot_cfg = shots = copy.copy(task.fewshot_cfg)
    for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        # of the class that reads the template: one that extends it would be applied twice
        render = functools.partial(getattr(ConfigurableTask, field), task)
        for settings in (config, shots):
            template = getattr(settings, field)
            if isinstance(template, str) and template not in task.features:
                setattr(settings, field, _cached_render(render, template))
    return worker


def _cached_render(render: Callable[[Any, str], Any], template: str) -> Callable[[Any], Any]:
    """Return `render(document, template)` as a function of the document, cached by its content."""
    results: dict[bytes, Any] = {}

    def rendered(document: Any) -> Any:
        key = hashlib.blake2b(pickle.dumps(document), digest_size=16).digest()
        if key not in results:
            results[key] = render(document, template)
        return results[key]

    return rendered


def _cached_process(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `process`, cached for each split if it returns a data set. A list is not cached: its
    rows could be changed by a reader, those of a data set are made at each read."""
    results: dict[int, tuple[Any, Any]] = {}

    def processed(split: Any) -> Any:
        from datasets import Dataset

        if id(split) in results:
            return results[id(split)][1]
        documents = process(split)
        if isinstance(documents, Dataset):
            results[id(split)] = (split, documents)  # keeps the split: its id stays its own
        return documents

    return processed


def _ties(choices: list[str], results: Any) -> tuple[bool, bool]:
    """Return whether different `choices` have the best log-likelihood, raw and per character."""
    nats = [float(result[0]) for result in results[: len(choices)]]  # further ones: unconditional
    per_character = [value / max(1, len(choice)) for value, choice in zip(nats, choices)]
    return _is_tie(choices, nats), _is_tie(choices, per_character)


def _is_tie(choices: list[str], values: list[float]) -> bool:
    best = max(values)
    return len({choice for choice, value in zip(choices, values) if value == best}) > 1


def no_cache() -> EvaluatorError:
    """Return the error of lm-eval's `use_cache`."""
    return EvaluatorError(
        "lm-eval's use_cache cannot be used in a sweep: its key is a hash of the request alone, so"
        " that every λ would get the scores of the first",
        "leave it out; a sweep keeps its points",
    )

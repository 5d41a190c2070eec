"""Which of a task's metrics is its score, and what a single document scores."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import EvaluatorError

PREFERRED = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
"""The first of these that a task measures is its score; else the first metric that it lists."""


@dataclass(frozen=True)
class Metric:
    """A metric as lm-eval's results name it: `name,filter`; without a filter, the first that the
    task applies."""

    name: str
    filter: str | None
    higher_is_better: bool

    def key(self, filters: list[str]) -> str:
        return f"{self.name},{filters[0] if self.filter is None else self.filter}"


def metric_of(task: Any, asked: str | None) -> Metric:
    """The metric that stands for `task`: the one asked for (`acc`, or `exact_match,strict-match`),
    or its primary one.

    Raises:
        EvaluatorError: the task does not measure it, or applies no such filter.
    """
    measured = list(task.aggregation())
    name, _, filter = (
        asked or next((one for one in PREFERRED if one in measured), measured[0])
    ).partition(",")
    if name not in measured:
        raise EvaluatorError(
            f"lm-eval task `{task.task_name}` has no metric `{name}`, it has {', '.join(measured)}",
            "choose one of those; tasks without a common metric go to two --eval",
        )
    filters = [one.name for one in getattr(task, "_filters", [])]
    if filter and filters and filter not in filters:
        raise EvaluatorError(
            f"lm-eval task `{task.task_name}` applies no filter `{filter}`, it has"
            f" {', '.join(filters)}",
            "choose one of those, or leave the filter out for the first",
        )
    return Metric(name, filter or None, task.higher_is_better().get(name) is not False)


def item_score(task: Any, metric: str, value: Any) -> float:
    """What one document scores: a number as it is; a likelihood in nats, per word or byte where the
    metric weighs; a label 1 where it is right; anything else by the task's own aggregation of that
    document alone."""
    from lm_eval.api import metrics as known

    if task.aggregation()[metric] in (known.f1_score, known.matthews_corrcoef):
        return float(value[0] == value[1])
    if metric == "perplexity" and isinstance(value, numbers.Real):
        return -float(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        return -float(value[0]) / float(value[1])
    return float(task.aggregation()[metric]([value]))


def item_parts(task: Any, metric: str, value: Any) -> dict[str, float] | None:
    """What one document adds to a metric that is no mean over documents, see `pa_fast.Item`.

    None where it is one, and where its parts are not known: labels that are not 0 and 1, BLEU, an
    aggregation of the task's own.
    """
    from lm_eval.api import metrics as known

    aggregation = task.aggregation()[metric]
    if aggregation in (known.f1_score, known.matthews_corrcoef):
        gold, said = value
        if gold not in (0, 1) or said not in (0, 1):
            return None
        counts = {"tp": gold and said, "fp": said and not gold, "fn": gold and not said}
        if aggregation is known.matthews_corrcoef:
            counts["tn"] = not gold and not said
        return {name: float(bool(count)) for name, count in counts.items()}
    if aggregation is known.perplexity:
        return {"nats": -float(value), "tokens": 1.0}
    if aggregation is known.weighted_perplexity:
        return {"nats": -float(value[0]), "tokens": float(value[1])}
    if aggregation is known.bits_per_byte:
        return {"numerator": -float(value[0]) / math.log(2), "denominator": float(value[1])}
    return None


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Every finite figure of every task and group: `arc_easy/acc_norm`,
    `gsm8k/exact_match,strict-match`."""
    return {
        f"{name}/{key.removesuffix(',none')}": float(value)
        for name, measured in results["results"].items()
        for key, value in measured.items()
        if "," in key and isinstance(value, numbers.Real) and math.isfinite(value)
    }

"""lm-eval tasks by name, loaded and checked before any model is, and their metrics."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import numbers
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pa_fast.errors import EvaluatorError, MissingExtra
from pa_fast.evals.lm_eval.cached_task import SEED, build_once
from pa_fast.evals.rows import limited
from pa_fast.units import format_count

OLDEST = (0, 4, 13)
INSTALL = "pip install 'pa_fast[eval]'"
PREFERRED = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")
"""The first of these that a task measures is its score; else the first metric that it lists."""


def require_lm_eval() -> str:
    """Return lm-eval's version.

    Raises:
        MissingExtra: it, or accelerate which its model class imports, is not installed or too old.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"lm-eval tasks need the package {package}, which is not installed", INSTALL
            )
    version = importlib.metadata.version("lm_eval")
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST:
        raise MissingExtra(
            f"found lm_eval {version}, expected {'.'.join(map(str, OLDEST))} or later", INSTALL
        )
    return version


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let only errors of lm-eval and datasets reach stderr: this library has its own bars."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks.

    Attributes:
        loaded: as `TaskManager.load` returns it; each task builds its requests once.
        code: Python files beside the YAML files, whose functions these may use.
    """

    loaded: Any
    code: tuple[pathlib.Path, ...]

    def __getitem__(self, name: str) -> Any:
        return self.loaded["tasks"][name]

    def __iter__(self) -> Any:
        return iter(self.loaded["tasks"])

    def versions(self) -> dict[str, str]:
        return {name: str(self[name].VERSION) for name in self}

    def digest(self, samples: Mapping[str, Sequence[int]]) -> str:
        """Return the SHA-256 of all that shapes the requests: configurations without paths, code,
        documents to score, documents to draw shots from.

        Args:
            samples: task → numbers of the documents to score; all where it is absent.
        """
        whole = hashlib.sha256(b"".join(path.read_bytes() for path in self.code))
        for name in sorted(self):
            task = self[name]
            settings = {
                key: value for key, value in task.dump_config().items() if key != "dataset_kwargs"
            }
            settings["metadata"] = {
                k: v for k, v in (settings.get("metadata") or {}).items() if k != "config_source"
            }
            pool = (
                task.sampler.df
                if (task.get_config("num_fewshot") or 0) > 0 and hasattr(task, "sampler")
                else ()
            )
            for part in ([settings], _sampled(task.eval_docs, samples.get(name)), pool):
                for value in part:
                    whole.update(plain_json(value).encode())
        return whole.hexdigest()


def _sampled(documents: Any, sample: Sequence[int] | None) -> Iterable[Any]:
    if sample is None:
        return documents
    chosen = set(sample)
    return (document for number, document in enumerate(documents) if number in chosen)


def plain_json(value: Any, **layout: Any) -> str:
    """Return the JSON text of a value of lm-eval, equal for equal values: functions by name,
    numbers of NumPy as numbers."""
    return json.dumps(value, default=_plain, ensure_ascii=False, **layout)


def _plain(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def load_tasks(
    names: Sequence[str], include_path: pathlib.Path | None, shots: int | None, seed: int
) -> Tasks:
    """Load tasks, groups and tags with their data.

    Args:
        include_path: folder of YAML files; its tasks hide lm-eval's own of the same name.
        shots: for all tasks; None: as each says, else 0.
        seed: draws the shots; 0 as lm-eval does.

    Raises:
        EvaluatorError: no such task, or it cannot be loaded or used here.
    """
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, list(manager.task_index), include_path)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # whatever a YAML file, its functions or a data set can break
        raise _broken(names, error) from error
    for name, task in loaded["tasks"].items():
        _check_usable(name, task)
        _set_shots(name, task, shots)
    code = () if include_path is None else tuple(sorted(include_path.glob("**/*.py")))
    return Tasks(build_once(loaded, SEED + seed), code)


def sample_documents(
    tasks: Tasks, limit: int | None, seed: int
) -> tuple[Tasks, dict[str, list[int]]]:
    """Draw at most `limit` documents of all tasks together.

    Returns:
        the tasks of which documents were drawn, without groups if one is left out, whose aggregates
        would lack it; and the numbers of each task's documents, empty where all are scored.
    """
    documents = (
        [(name, number) for name in tasks for number in range(len(tasks[name].eval_docs))]
        if limit
        else []
    )
    if limit is None or limit >= len(documents):
        return tasks, {}
    samples: dict[str, list[int]] = {}
    for name, number in limited(documents, [name for name, _ in documents], limit, seed):
        samples.setdefault(name, []).append(number)
    kept = {name: tasks[name] for name in tasks if name in samples}
    loaded = (
        tasks.loaded
        if len(kept) == len(list(tasks))
        else {"tasks": kept, "groups": {}, "group_map": {}}
    )
    return Tasks(loaded, tasks.code), samples


@functools.cache
def registered_tasks() -> Any:
    """Return the manager of lm-eval's own tasks, 14,000 YAML files, cached for the process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(names: Iterable[str], include_path: pathlib.Path | None) -> Any:
    """Return a TaskManager that knows `names`, as far as there are such tasks; lm-eval's own are
    indexed only for names that `include_path` lacks."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return registered_tasks()
    if not include_path.is_dir():
        raise EvaluatorError(
            f"include_path {include_path} is not a folder",
            "give the folder that holds the tasks' YAML files",
        )
    manager = TaskManager(include_path=str(include_path.absolute()), include_defaults=False)
    if not all(_is_complete(name, manager.task_index) for name in names):
        for name, entry in registered_tasks().task_index.items():
            manager.task_index.setdefault(name, entry)
    return manager


def _is_complete(name: str, index: Any) -> bool:
    """Return whether `name` is in `index`, and if it is a group, all that it names too."""
    if name not in index:
        return False
    listed = (index[name].cfg or {}).get("task") if "group" in (index[name].cfg or {}) else None
    inner = [
        one if isinstance(one, str) else one.get("group", one.get("task")) for one in listed or ()
    ]
    return all(isinstance(one, str) and _is_complete(one, index) for one in inner)


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 and shots > 0:
        raise EvaluatorError(
            f"lm-eval task `{name}` is fixed at 0 shots by its configuration, found shots={shots}",
            "leave shots out for it: one --eval for each number of shots",
        )
    count = own or 0 if shots is None else shots
    task.set_config(key="num_fewshot", value=count)
    held = _pool_size(task)
    if held is not None and count > held:
        raise EvaluatorError(
            f"lm-eval task `{name}` has {format_count(held, 'document')} to draw shots from,"
            f" expected at least shots={count}",
            f"take shots={held} or fewer" if held else "take shots=0",
        )


def _pool_size(task: Any) -> int | None:
    """Return the number of documents that can be shots of another one; None where a task draws
    shots in its own way."""
    from lm_eval.api.samplers import ContextSampler, FirstNSampler
    from lm_eval.api.task import ConfigurableTask

    sampler = getattr(task, "sampler", None)
    if not isinstance(task, ConfigurableTask) or type(sampler) not in (
        ContextSampler,
        FirstNSampler,
        type(None),
    ):
        return None
    held = 0 if sampler is None else len(sampler.fewshot_indices or sampler.df)
    # drawn from the documents that are scored: none is shown before itself
    return held - 1 if held and task.fewshot_cfg.split == task.config.test_split else held


def _check_usable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise EvaluatorError(
            f"lm-eval task `{name}` runs code that the model writes, which is refused here",
            "leave it out",
        )
    if getattr(task, "MULTIMODAL", False):
        raise EvaluatorError(
            f"lm-eval task `{name}` needs images or sound, and only text models are scored",
            "leave it out",
        )
    if "bypass" in task.aggregation() or not task.aggregation():
        raise EvaluatorError(
            f"lm-eval task `{name}` measures nothing (metrics: {', '.join(task.aggregation())})",
            "leave it out",
        )


def _unknown(name: str, known: Sequence[str], include_path: pathlib.Path | None) -> EvaluatorError:
    near = difflib.get_close_matches(name, known, n=3)
    unreadable = [] if include_path is None else list(_unreadable(include_path))
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "`lm-eval ls tasks` lists lm-eval's own; include_path= adds yours"
    )
    where = "" if include_path is None else f", nor in {include_path}"
    broken = f"; {unreadable[0]}" if unreadable else ""
    return EvaluatorError(f"lm-eval has no task, group or tag `{name}`{where}{broken}", hint)


def _unreadable(include_path: pathlib.Path) -> Iterable[str]:
    """Yield the YAML files that lm-eval could not read, with their errors."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(include_path.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever a YAML file can hold
            yield f"{path} cannot be read: {' '.join(str(error).split())}"


def _broken(names: Sequence[str], error: Exception) -> EvaluatorError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    hint = (
        "check the task's YAML file and its data; data sets of the hub need network access the"
        " first time"
    )
    if isinstance(error, ImportError):
        hint = (
            "install what the task imports; lm-eval has extras for that, such as pip install"
            " 'lm-eval[ifeval]'"
        )
    return EvaluatorError(f"lm-eval cannot load {', '.join(names)}: {reason}", hint)


@dataclass(frozen=True)
class Metric:
    """A metric as lm-eval's results name it: `name,filter`; without a filter, the first that the
    task applies."""

    name: str
    filter: str | None
    higher_is_better: bool

    def key(self, filters: Sequence[str]) -> str:
        return f"{self.name},{filters[0] if self.filter is None else self.filter}"


def metric_of(task: Any, wanted: str | None) -> Metric:
    """Return the metric of `task`: the one `wanted` (`acc`, or `exact_match,strict-match`), or its
    primary one.

    Raises:
        EvaluatorError: the task does not measure it, or applies no such filter.
    """
    measured = list(task.aggregation())
    name, _, filter = (
        wanted or next((one for one in PREFERRED if one in measured), measured[0])
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
    """Return the score of one document: a number as it is; a likelihood in nats, per word or byte
    where the metric weighs; a label 1 where it is right; anything else by the task's own
    aggregation of that document alone."""
    from lm_eval.api import metrics as known

    if task.aggregation()[metric] in (known.f1_score, known.matthews_corrcoef):
        return float(value[0] == value[1])
    if isinstance(value, numbers.Real):
        return -float(value) if metric == "perplexity" else float(value)
    if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        return -float(value[0]) / float(value[1])
    return float(task.aggregation()[metric]([value]))


def item_parts(task: Any, metric: str, value: Any) -> dict[str, float] | None:
    """Return the parts that one document adds to a metric that is no mean, see `pa_fast.Item`.

    None for a mean, and for metrics without known parts: labels that are not 0 and 1, BLEU, an
    aggregation of the task's own.
    """
    from lm_eval.api import metrics as known

    aggregation = task.aggregation()[metric]
    if aggregation in (known.f1_score, known.matthews_corrcoef):
        gold, predicted = value
        if gold not in (0, 1) or predicted not in (0, 1):
            return None
        counts = {
            "tp": gold and predicted,
            "fp": predicted and not gold,
            "fn": gold and not predicted,
        }
        if aggregation is known.matthews_corrcoef:
            counts["tn"] = not gold and not predicted
        return {name: float(bool(count)) for name, count in counts.items()}
    if aggregation is known.perplexity:
        return {"nats": -float(value), "tokens": 1.0}
    if aggregation is known.weighted_perplexity:
        return {"nats": -float(value[0]), "tokens": float(value[1])}
    if aggregation is known.bits_per_byte:
        return {"numerator": -float(value[0]) / math.log(2), "denominator": float(value[1])}
    return None


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return every finite figure of every task and group: `arc_easy/acc_norm`,
    `gsm8k/exact_match,strict-match`."""
    return {
        f"{name}/{key.removesuffix(',none')}": float(value)
        for name, measured in results["results"].items()
        for key, value in measured.items()
        if "," in key and isinstance(value, numbers.Real) and math.isfinite(value)
    }

"""The lm-eval evaluator: tasks loaded once, requests built once, scored at every λ."""

from __future__ import annotations

import contextlib
import io
import pathlib
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pa_fast.base import Engine, Evaluator, Item, Lambda, Score, complete
from pa_fast.errors import EvaluatorError, PaFastError, UsageError, first_line
from pa_fast.evals.kind import EvalSpec, EvaluatorKind
from pa_fast.evals.lm_eval.cached_task import SEED
from pa_fast.evals.lm_eval.result_files import ResultFiles
from pa_fast.evals.lm_eval.tasks import (
    figures,
    item_parts,
    item_score,
    load_tasks,
    metric_of,
    quiet,
    require_lm_eval,
    sample_documents,
)
from pa_fast.evals.scores import AVERAGES, labelled, weighted


class LmEval:
    """Mean over tasks of each one's metric, or with `average=micro` over their documents; an item
    is a document, its group the task.

    A task's metric is `acc_norm` if it has that, else `acc`, `exact_match`,
    `prompt_level_strict_acc`, else the first that it lists. Groups and tags are replaced by their
    tasks, which all count the same. The details have every figure of every task and group, a
    group's own aggregate and the ties of tasks with choices among them. The files are those of
    lm-eval's own command line, see `ResultFiles`.

    Args:
        tasks: names of tasks, groups and tags.
        shots: examples before each document; None: as each task says.
        chat: apply the tokenizer's chat template, shots as turns of their own.
        include_path: folder of YAML files with more tasks.
        metric: the metric for all tasks, `name` or `name,filter`.
        limit: most documents in all, see `rows.limited`. Tasks of which none is drawn are left out,
            and groups with them.
        seed: 0 draws shots and samples as lm-eval does by default.
        overflow: `truncate` cuts requests that are too long for the model on the left, as lm-eval
            does; `refuse` does not.
        average: see `scores.AVERAGES`.
        log_samples: keep `samples_*.jsonl`, each document with its prompts and answers.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvaluatorError: a task or its data cannot be loaded, or the tasks' metrics have no common
            direction.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[str],
        *,
        shots: int | None,
        chat: bool,
        include_path: pathlib.Path | None,
        metric: str | None,
        limit: int | None,
        seed: int,
        overflow: str = "truncate",
        average: str = "macro",
        log_samples: bool = True,
    ):
        version = require_lm_eval()
        self.name, self.chat, self.limit, self.seed = name, chat, limit, seed
        self.overflow, self.average, self.log_samples = overflow, average, log_samples
        with quiet():
            self.tasks, self.samples = sample_documents(
                load_tasks(tasks, include_path, shots, seed), limit, seed
            )
        self.metrics = {task: metric_of(self.tasks[task], metric) for task in self.tasks}
        self.higher_is_better = _direction(self.metrics)
        self.identity: Mapping[str, Any] = {
            "evaluator": "lm-eval",
            "lm_eval": version,
            "tasks": list(tasks),
            "versions": self.tasks.versions(),
            "shots": shots,
            "chat": chat,
            "metric": metric,
            "overflow": overflow,
            "average": average,
            "limit": limit,
            "seed": seed,
            "sha256": self.tasks.digest(self.samples),
        }
        self._model: Any = None

    def check(self, engine: Engine) -> list[str]:
        """Build and encode all requests; return a note on those that are cut.

        Raises:
            EvaluatorError: the engine has no transformers model and no vLLM, the tokenizer no chat
                template, the model no positions for an answer; or a request is too long, and
                overflow=refuse.
        """
        with quiet(), _seeded(self.seed):
            lm = self._lm(engine)
            requests = self._build_requests(lm)
            cut = lm.prepare(requests)
        if not cut:
            return []
        message = (
            f"{cut} of {len(requests)} requests are too long for the model, which has positions for"
            f" {lm.max_length} tokens"
        )
        if self.overflow == "refuse":
            cuts = "overflow=truncate cuts them on the left as lm-eval does"
            shown = any(self.tasks[name].get_config("num_fewshot") for name in self.tasks)
            raise EvaluatorError(message, f"{cuts}; or take fewer shots=" if shown else cuts)
        return [f"{message}: they lose the beginning of their prompt, as in lm-eval"]

    def _build_requests(self, lm: Any) -> list[Any]:
        """Build all requests, task after task, with the options of `evaluate`, which then has them
        cached at every λ."""
        requests: list[Any] = []
        for name in self.tasks:
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # its bar has no switch
                    self.tasks[name].build_all_requests(
                        limit=None,
                        samples=self.samples.get(name),
                        rank=lm.rank,
                        world_size=lm.world_size,
                        cache_requests=False,
                        rewrite_requests_cache=False,
                        system_instruction=None,
                        apply_chat_template=self.chat,
                        fewshot_as_multiturn=self.chat,
                        chat_template=lm.apply_chat_template if self.chat else None,
                        tokenizer_name=lm.tokenizer_name if self.chat else "",
                    )
            except PaFastError:
                raise
            except Exception as error:  # whatever templates, samplers and functions of a task can
                raise EvaluatorError(
                    f"lm-eval task `{name}` cannot write its requests: {type(error).__name__}:"
                    f" {first_line(error)}",
                    "check the task's templates and functions, and its documents and shots",
                ) from error
            requests += [
                instance for instance in self.tasks[name].instances for _ in range(instance.repeats)
            ]
        return requests

    def __call__(self, engine: Engine) -> Score:
        from lm_eval.evaluator import evaluate

        with quiet(), _seeded(self.seed):
            lm = self._lm(engine)
            self._build_requests(lm)
            lm.cut = 0
            files = self._files(engine, lm)
            results: Any = evaluate(
                lm=lm,
                task_dict=self.tasks.loaded,
                samples=self.samples or None,
                bootstrap_iters=0,
                log_samples=self.log_samples,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
            )
        samples = results.pop("samples", None)
        keys = {
            name: metric.key(self.tasks[name].filters()) for name, metric in self.metrics.items()
        }
        values = {
            name: self._value(name, key, results["results"][name]) for name, key in keys.items()
        }
        items = [item for name, key in keys.items() for item in self._items(name, key)]
        sizes = Counter(item.group for item in items)
        weights = {name: sizes[name] if self.average == "micro" else 1 for name in keys}
        unit = " and ".join(dict.fromkeys(key.removesuffix(",none") for key in keys.values()))
        ties = {
            f"{name}/ties": float(self.tasks[name].tie_count(key))
            for name, key in keys.items()
            if self.tasks[name].tied
        }
        count = sum(len(self.tasks[name].instances) for name in self.tasks)
        return Score(
            sum(weights[name] * value for name, value in values.items()) / sum(weights.values()),
            labelled(unit, keys, self.average),
            len(items),
            weighted(_all_with_parts(items), self.average),
            {**figures(results), **ties, "requests_cut": lm.cut / count},
            files.texts(self._document(engine, lm, results), samples),
        )

    def _lm(self, engine: Engine) -> Any:
        """Return lm-eval's model around `engine`, cached with its requests as long as the engine
        is the same."""
        if self._model is None or self._model.engine is not engine:
            if complete(engine).llm is not None:
                from pa_fast.evals.lm_eval.vllm_model import PaFastVLLM

                self._model = PaFastVLLM(engine)
            else:
                from pa_fast.evals.lm_eval.model import PaFastLM

                self._model = PaFastLM(engine, bars=False)
        if self.chat and not self._model.tokenizer.chat_template:
            raise EvaluatorError(
                f"{self.name}: the tokenizer has no chat template",
                "chat=false, or another --tokenizer",
            )
        return self._model

    def _value(self, task: str, key: str, measured: Mapping[str, Any]) -> float:
        if key not in measured:
            names = ", ".join(
                key.removesuffix(",none")
                for key in measured
                if "," in key and "_stderr," not in key
            )
            raise EvaluatorError(
                f"{self.name}: `{task}` measured no {key.removesuffix(',none')}, only {names}",
                "choose a metric=",
            )
        return float(measured[key])

    def _items(self, name: str, key: str) -> Iterator[Item]:
        """Yield the items of one task, all with parts or none."""
        metric, _, filter = key.partition(",")
        task, sample = self.tasks[name], self.samples.get(name)
        measured = [
            (str(document if sample is None else sample[document]), metrics[metric])
            for document, metrics in enumerate(task.of_filter(task.measured, filter))
            if metric in metrics
        ]
        parts = [item_parts(task, metric, value) for _, value in measured]
        known = None not in parts
        for (id, value), part in zip(measured, parts):
            yield Item(id, name, item_score(task, metric, value), parts=part if known else None)

    def _files(self, engine: Engine, lm: Any) -> ResultFiles:
        lam = _key(engine)
        template = lm.tokenizer.chat_template if self.chat else None
        return ResultFiles(f"lambda={lam}.{self.name}", _arguments(engine), template)

    def _document(self, engine: Engine, lm: Any, results: Any) -> dict[str, Any]:
        """Return `results` in the form that lm-eval's command line writes."""
        from lm_eval.loggers.utils import add_tokenizer_info

        document = {
            **results,
            "config": {
                "model": "pa_fast",
                "model_args": _arguments(engine),
                "batch_size": lm.batch_size,
                "batch_sizes": [],
                "device": str(lm.device),
                "use_cache": None,
                "limit": self.limit,
                "bootstrap_iters": 0,
                "gen_kwargs": None,
                "random_seed": self.seed,
                "numpy_seed": SEED + self.seed,
                "torch_seed": SEED + self.seed,
                "fewshot_seed": SEED + self.seed,
                "pa_fast": {
                    "lambda": _key(engine),
                    **{
                        key: complete(engine).identity.get(key)
                        for key in ("base", "instruct", "dtype", "store", "rounding")
                    },
                    "checksum": f"{engine.weights.checksum():016x}",
                },
            },
            "lm_eval_version": self.identity["lm_eval"],
        }
        add_tokenizer_info(document, lm)
        return document


def _key(engine: Engine) -> str | None:
    return None if engine.weights.lam is None else Lambda(engine.weights.lam).key


def _arguments(engine: Engine) -> dict[str, Any]:
    """Return what lm-eval's results name the model by: its pair and λ."""
    configuration = complete(engine).configuration
    sides = {key: configuration.get(key) for key in ("base", "instruct")}
    return sides | {"lambda": _key(engine)}


def _direction(metrics: Mapping[str, Any]) -> bool:
    up = [f"{task} ({metric.name})" for task, metric in metrics.items() if metric.higher_is_better]
    down = [
        f"{task} ({metric.name})" for task, metric in metrics.items() if not metric.higher_is_better
    ]
    if up and down:
        raise EvaluatorError(
            f"lm-eval: more is better for {up[0]} and worse for {down[0]}",
            "make two --eval of them",
        )
    return bool(up)


def _all_with_parts(items: Sequence[Item]) -> Sequence[Item]:
    """Return `items`; where some have parts, the others get those of a mean, sum and count."""
    if not any(item.parts for item in items):
        return items
    return [
        item if item.parts else replace(item, parts={"numerator": item.score, "denominator": 1.0})
        for item in items
    ]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the seeds of lm-eval's `simple_evaluate`, for tasks that sample; restore the state of the
    generators afterwards."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(SEED + seed)
        torch.manual_seed(SEED + seed)
        if "langdetect" in sys.modules:  # IFEval's, which guesses with a generator of its own
            sys.modules["langdetect"].DetectorFactory.seed = seed
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _build(spec: EvalSpec, limit: int | None, seed: int) -> Evaluator:
    if "use_cache" in spec.options:
        raise UsageError(
            f"`{spec.text}`: use_cache would give every λ the scores of the first: lm-eval's cache"
            " knows requests, not weights",
            "leave it out; a sweep keeps its points by itself",
        )
    return LmEval(
        spec.column,
        spec.targets,
        shots=spec.count("shots", 0, least=0) if "shots" in spec.options else None,
        chat=spec.flag("chat", False),
        include_path=(
            spec.path(spec.options["include_path"]) if "include_path" in spec.options else None
        ),
        metric=spec.options.get("metric"),
        limit=limit,
        seed=seed,
        overflow=spec.word("overflow", ("truncate", "refuse")),
        average=spec.word("average", AVERAGES),
        log_samples=spec.flag("log_samples", True),
    )


KIND = EvaluatorKind(
    "lm-eval",
    "task",
    "lm-eval:piqa,arc_easy,shots=5",
    (
        *("shots", "chat", "metric", "include_path", "use_cache", "overflow", "average"),
        "log_samples",
    ),
    _build,
    many=True,
    label=str,
    paths=("include_path",),
)

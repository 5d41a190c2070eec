"""The files that lm-eval's command line leaves of one evaluation, written by lm-eval itself."""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from pa_fast.errors import EvaluatorError
from pa_fast.evals.lm_eval.tasks import plain_json, quiet

DATE = "1970-01-01T00-00-00.000000"
"""In the names of all files: lm-eval's readers want a date there."""

_WRITTEN = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+")


class ResultFiles:
    """The files of one evaluation, as lm-eval's own `EvaluationTracker` writes and names them, but
    for times: equal evaluations leave equal files, so that all are of one `DATE`.

    Args:
        name: of the model: its λ.
        arguments: of the model, `lambda` among them.
        chat_template: applied to the prompts; None without.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], chat_template: str | None):
        from lm_eval.loggers import EvaluationTracker

        self._tracker = EvaluationTracker()
        self._tracker.general_config_tracker.log_experiment_args(
            model_source="pa_fast",
            model_args={**arguments, "model": name},
            system_instruction=None,
            chat_template=chat_template,
            fewshot_as_multiturn=chat_template is not None,
        )

    def texts(
        self, results: Mapping[str, Any], samples: Mapping[str, Sequence[Any]] | None
    ) -> dict[str, str]:
        """Return the text of `results_DATE.json`, and of `samples_TASK_DATE.jsonl` for each task,
        by name; the first without how long it took, which `journal.jsonl` says.

        Args:
            results: what lm-eval's command line would write.
            samples: of `evaluate(log_samples=True)`; None: no such files.

        Raises:
            EvaluatorError: lm-eval could not write them, and says so in its log alone.
        """
        with quiet(), tempfile.TemporaryDirectory() as folder:
            self._tracker.output_path = folder
            # functions by name: lm-eval would write their addresses
            plain = json.loads(plain_json({**results, "date": 0.0}))
            self._tracker.save_results_aggregated(plain, samples)
            for task, documents in (samples or {}).items():
                self._tracker.save_results_samples(task, documents)
            texts = {
                _plain(_WRITTEN.sub(DATE, path.name)): path.read_text(encoding="utf-8")
                for path in sorted(pathlib.Path(folder).glob("*/*"))
            }
        name = f"results_{DATE}.json"
        if name in texts:
            document = json.loads(texts[name])
            document.pop("total_evaluation_time_seconds", None)
            texts[name] = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        rows = sum(map(len, (samples or {}).values()))
        lines = sum(text.count("\n") for name, text in texts.items() if name.endswith("l"))
        if (len(texts), lines) != (1 + len(samples or {}), rows):
            raise EvaluatorError(
                f"lm-eval wrote {lines} of {rows} samples, and {len(texts)} of"
                f" {1 + len(samples or {})} files of its results",
                f"make room in {tempfile.gettempdir()}, or set TMPDIR; log_samples=false writes"
                " less",
            )
        return texts


def _plain(name: str) -> str:
    """Return a file name that a run folder takes, whatever the task is called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)

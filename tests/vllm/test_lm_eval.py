"""lm-eval on one engine for all λ: item by item what its own VLLM says of merged folders."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import pa_fast
from tests.vllm.conftest import OPTIONS, clean_up

pytest.importorskip("lm_eval")
COUNT = 12


@pytest.fixture
def tasks(tmp_path: pathlib.Path) -> pathlib.Path:
    rows = [
        {"prompt": f"{a} plus {a + 1} is", "choices": [f" {a}", " seven", " 3 x"], "gold": a % 3}
        for a in range(COUNT)
    ]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\ndoc_to_text: '{{prompt}}'\n"
    )
    (tmp_path / "chosen.yaml").write_text(
        f"task: chosen\n{common}output_type: multiple_choice\n"
        "doc_to_choice: choices\ndoc_to_target: gold\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "spoken.yaml").write_text(
        f"task: spoken\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[1]}}}}'\n"
        "generation_kwargs:\n  until: []\n  max_gen_toks: 6\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return tmp_path


def answers(lm: Any, tasks: pathlib.Path) -> dict[str, Any]:
    """Every response of lm-eval's `evaluate`, by task and document."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    done = simple_evaluate(
        lm,
        tasks=["chosen", "spoken"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        name: [sample["filtered_resps"] for sample in samples]
        for name, samples in done["samples"].items()
    }


def test_items_are_those_of_its_own_vllm(
    pair: tuple[str, str], tasks: pathlib.Path, engine: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    # before lm-eval's: it knows the version of a distribution of another name
    PaFastVLLM = pa_fast.lm_eval.PaFastVLLM
    from lm_eval.models.vllm_causallms import VLLM

    own = {}
    for lam in (0.0, 0.7):
        pa_fast.merge(*pair, lam, tmp_path / f"{lam}")
        lm = VLLM(pretrained=str(tmp_path / f"{lam}"), batch_size="auto", **OPTIONS)
        own[lam] = answers(lm, tasks)
        lm.model.llm_engine.engine_core.shutdown()
        del lm
        clean_up()
    swept = engine(*pair)
    around = PaFastVLLM(swept)
    for lam in (0.7, 0.0, 0.7):
        swept.set_lambda(lam)
        assert answers(around, tasks) == own[lam]
    assert own[0.0] != own[0.7], "the test must be able to fail"


def test_the_evaluator_sweeps(
    pair: tuple[str, str], tasks: pathlib.Path, engine: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    lm = engine(*pair)
    done = pa_fast.sweep(
        lm, "0,0.7", [f"lm-eval:chosen,spoken,include_path={tasks}"], tmp_path / "run"
    )
    assert not done.failures and len(done.rows) == 2


def test_caches_and_engines_of_its_own_are_refused(
    pair: tuple[str, str], engine: Callable[..., Any]
) -> None:
    from pa_fast.evals.lm_eval.vllm_model import PaFastVLLM

    lm = engine(*pair)
    with pytest.raises(pa_fast.PaFastError, match="use_cache"):
        PaFastVLLM(lm, use_cache="here")
    with pytest.raises(pa_fast.PaFastError, match="data_parallel_size=2"):
        PaFastVLLM(lm, data_parallel_size=2)
    with pytest.raises(pa_fast.PaFastError, match="max_num_seqs=2"):
        PaFastVLLM(lm, max_num_seqs=2)

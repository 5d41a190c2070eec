"""lm-eval on a live model: the figures of a fresh process for every λ, and nothing done twice."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pa_fast
import pa_fast.evals.lm_eval as ours
from pa_fast.base import Score
from pa_fast.evals import build
from pa_fast.evals.lm_eval.tasks import plain_json
from tests import patience
from tests.evals.harness_tasks import BATCH, CASES, PAIR
from tests.evals.stock import evaluated, loaded, write
from tests.programs import Program

LAMBDAS = ("0.4", "0.9")


@pytest.fixture(scope="module")
def stock(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results and samples of lm-eval's own HFLM on saved merges, each λ in a process of its own."""
    home = tmp_path_factory.mktemp("stock")
    merged = {lam: home / f"merged-{lam}" for lam in LAMBDAS}
    processes = []
    for lam, folder in merged.items():
        pa_fast.merge(*PAIR, lam=float(lam), out=folder)
        offline = {"HF_HOME": str(home), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        processes.append(
            Program(write, str(tasks), BATCH, str(folder), folder=home, environment=offline)
        )
    for process in processes:
        _, errors = patience.communicate(process)
        assert process.returncode == 0, errors[-3000:]
    return {
        lam: json.loads((folder / "stock.json").read_text(encoding="utf-8"))
        for lam, folder in merged.items()
    }


@pytest.fixture(scope="module")
def scored(engine: Any, tasks: Path) -> Callable[[str, str], Score]:
    """The score of a case at a λ by our evaluator, computed once."""

    @functools.cache
    def evaluator(case: str) -> Any:
        names, shots, chat = CASES[case]
        names = [name for name in names if name != "t_rolling"]
        options = f"shots={shots},chat={str(chat).lower()},include_path={tasks}"
        one = build(f"lm-eval:{','.join(names)},{options}")
        assert one.higher_is_better
        return one

    @functools.cache
    def score(case: str, lam: str) -> Score:
        engine.set_lambda(float(lam))
        found: Score = evaluator(case)(engine)
        return found

    return score


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often any text of a request is encoded, any context built, any template rendered."""
    import lm_eval.utils
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    calls = {"encoded": 0, "built": 0, "rendered": 0}

    def counting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[what] += 1
            return function(*args, **options)

        return call

    for owner, name, what in (
        (HFLM, "tok_encode", "encoded"),
        (HFLM, "tok_batch_encode", "encoded"),
        (ConfigurableTask, "fewshot_context", "built"),
        (lm_eval.utils, "apply_template", "rendered"),
    ):
        monkeypatch.setattr(owner, name, counting(what, getattr(owner, name)))
    return calls


def spelt(results: Any) -> Any:
    """As read from a file."""
    return json.loads(plain_json(results))


@pytest.mark.parametrize("case", CASES)
def test_reused_requests_give_what_fresh_processes_give(
    case: str, stock: dict[str, Any], engine: Any, tasks: Path, counted: dict[str, int]
) -> None:
    names, shots, chat = CASES[case]
    lm, once = ours.PaFastLM(engine), ours.build_once(loaded(str(tasks), names, shots))
    for round_, lam in enumerate((*LAMBDAS, LAMBDAS[0])):
        engine.set_lambda(float(lam))
        before = dict(counted)
        results = spelt(evaluated(lm, once, chat))
        assert results["samples"] == stock[lam][case]["samples"]
        assert results["results"] == stock[lam][case]["results"]
        assert [counted[what] > before[what] for what in counted] == [round_ == 0] * 3, (
            "the first λ encodes, builds and renders, and no other"
        )
    assert stock[LAMBDAS[0]][case]["samples"] != stock[LAMBDAS[1]][case]["samples"], (
        "the comparison must be able to fail"
    )


def test_requests_that_share_a_row_are_scored_as_lm_eval_does(engine: Any, tasks: Path) -> None:
    lm = ours.PaFastLM(engine)
    once = ours.build_once(loaded(str(tasks), ["t_likelihood"], 0))
    evaluated(lm, once, False)
    rows = sum(len(batch.ids) for _, encoded in lm._known for batch in encoded.batches)
    assert rows == len(once["tasks"]["t_likelihood"].instances) - 1


@pytest.mark.parametrize("case", CASES)
def test_the_evaluator_scores_what_lm_eval_scores(
    case: str, stock: dict[str, Any], scored: Callable[[str, str], Score]
) -> None:
    names = [name for name in CASES[case][0] if name != "t_rolling"]
    primary = {
        "t_choice": "acc_norm,none",
        "t_likelihood": "acc,none",
        "t_answer": "exact_match,strict",
    }
    for lam in LAMBDAS:
        score, said = scored(case, lam), stock[lam][case]
        values = [said["results"][name][primary[name]] for name in names]
        assert score.value == pytest.approx(sum(values) / len(values), rel=1e-15)
        unit = " and ".join(dict.fromkeys(primary[name].removesuffix(",none") for name in names))
        assert score.unit == (f"{unit}, macro" if len(names) > 1 else unit)
        for name in names:
            metric, _, filter = primary[name].partition(",")
            expected = {
                str(s["doc_id"]): float(s[metric])
                for s in said["samples"][name]
                if s["filter"] == filter
            }
            assert {item.id: item.score for item in score.items if item.group == name} == expected
            figures = {
                key: value
                for key, value in said["results"][name].items()
                if "," in key and "_stderr" not in key
            }
            for key, value in figures.items():
                assert score.details[f"{name}/{key.removesuffix(',none')}"] == value
        assert (
            score.n
            == len(score.items)
            == sum(said["n-samples"][name]["effective"] for name in names)
        )


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_that_lm_eval_writes(
    case: str, stock: dict[str, Any], scored: Callable[[str, str], Score], tmp_path: Path
) -> None:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import get_file_datetime

    names, _, chat = CASES[case]
    names = [name for name in names if name != "t_rolling"]
    for lam in LAMBDAS:
        files = scored(case, lam).files
        own = EvaluationTracker(output_path=str(tmp_path / lam))
        own.general_config_tracker.log_experiment_args("hf", {"pretrained": "m"}, None, None, chat)
        samples = {name: stock[lam][case]["samples"][name] for name in names}
        own.save_results_aggregated(dict(stock[lam][case]), samples)
        for name in names:
            own.save_results_samples(name, samples[name])
        theirs = {path.name: path.read_text() for path in (tmp_path / lam / "m").iterdir()}

        def undated(written: Any) -> dict[str, Any]:
            read = {name.rpartition("_")[0]: text for name, text in written.items()}
            assert all(get_file_datetime(name) >= "1970" for name in written)
            results = json.loads(read.pop("results"))
            return read | {"hashes": results["task_hashes"]}

        assert undated(files) == undated(theirs)


def test_likelihoods_of_documents_are_nats(stock: dict[str, Any], engine: Any, tasks: Path) -> None:
    rolling = build(f"lm-eval:t_rolling,include_path={tasks}")
    engine.set_lambda(float(LAMBDAS[0]))
    score, said = rolling(engine), stock[LAMBDAS[0]]["plain"]
    assert not rolling.higher_is_better
    assert (score.value, score.unit) == (
        said["results"]["t_rolling"]["word_perplexity,none"],
        "word_perplexity",
    )
    pairs = [sample["word_perplexity"] for sample in said["samples"]["t_rolling"]]
    assert [item.score for item in score.items] == [-nats / words for nats, words in pairs]
    likelihood = build(f"lm-eval:t_likelihood,include_path={tasks},metric=perplexity")
    assert not likelihood.higher_is_better
    score = likelihood(engine)
    assert score.value == pytest.approx(math.exp(sum(item.score for item in score.items) / score.n))

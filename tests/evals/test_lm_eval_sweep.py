"""Whole sweeps with `--eval lm-eval:…`, and IFEval over local prompts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pa_fast import cli
from pa_fast.evals import build
from pa_fast.evals.lm_eval import tasks as loading
from pa_fast.sweep import figure
from tests.evals.harness_tasks import PAIR

pytestmark = pytest.mark.usefixtures("lm_eval")

_IFEVAL = """
include: {installed}
task: i_local
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/prompts.jsonl}}}}
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: 12}}
"""
_PROMPTS = [
    {
        "key": 1,
        "prompt": "rev abc",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 2,
        "prompt": "rev abcd",
        "instruction_id_list": ["change_case:english_capital"],
        "kwargs": [{}],
    },
    {
        "key": 3,
        "prompt": "rev ab",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    },
]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the figure shows is asked elsewhere."""
    monkeypatch.setattr(figure, "write", lambda result: None)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pa-fast", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def by_lm_eval(outputs: Path) -> list[tuple[str, str, dict[str, int]]]:
    """λ, evaluator, and number of samples of each task, read as lm-eval's own viewers read an
    output_path: newest files of each model's folder, named by lm-eval's own functions."""
    import datasets
    from lm_eval import utils

    found = []
    for folder in sorted(outputs.iterdir()):
        paths = [str(path) for path in folder.iterdir()]
        newest = utils.get_latest_filename(utils.get_results_filenames(paths))
        results = json.loads(Path(newest).read_text(encoding="utf-8"))
        assert results["model_name_sanitized"] == folder.name
        counts = {}
        for path in utils.get_sample_results_filenames(paths):
            task = utils.get_file_task_name(Path(path).name)
            read = datasets.load_dataset("json", data_files=path, split="train")
            filters = len(set(read["filter"]))
            assert len(read) == results["n-samples"][task]["effective"] * filters
            assert utils.get_file_datetime(path) == newest.rpartition("_")[2][: -len(".json")]
            counts[task] = len(read)
        assert counts.keys() == results["results"].keys() == results["task_hashes"].keys()
        _, lam, evaluator = re.split("[=.]", folder.name)
        assert results["config"]["model_args"]["lambda"] == lam
        found.append((lam, evaluator, counts))
    return found


def test_a_sweep_and_its_second_call(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = [
        f"lm-eval:t_choice,t_answer,include_path={tasks},name=both",
        f"lm-eval:t_rolling,include_path={tasks},name=text",
    ]
    out = tmp_path / "run"
    sweep = [
        "sweep",
        *map(str, PAIR),
        "--out",
        str(out),
        *(part for one in evals for part in ("--eval", one)),
    ]
    assert run(monkeypatch, *sweep, "--lambdas", "0,1") == 0
    journal = (out / "journal.jsonl").read_bytes()
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["lambda"], row["evaluator"]) for row in rows] == [
        ("0", "both"),
        ("0", "text"),
        ("1", "both"),
        ("1", "text"),
    ]
    assert (
        rows[2]["details"]["t_answer/exact_match,strict"]
        >= rows[0]["details"]["t_answer/exact_match,strict"]
    )
    assert by_lm_eval(out / "outputs") == [
        ("0", "both", {"t_choice": 12, "t_answer": 24}),
        ("0", "text", {"t_rolling": 3}),
        ("1", "both", {"t_choice": 12, "t_answer": 24}),
        ("1", "text", {"t_rolling": 3}),
    ]
    assert run(monkeypatch, *sweep, "--lambdas", "0,1") == 0
    assert (out / "journal.jsonl").read_bytes() == journal, "finished points are not run again"
    assert run(monkeypatch, *sweep, "--lambdas", "0,1/2,1") == 0
    assert len(json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]) == 6


def test_another_task_under_the_same_name_is_another_sweep(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = [
        "sweep",
        *map(str, PAIR),
        "--out",
        str(tmp_path / "run"),
        "--lambdas",
        "0",
        "--limit",
        "2",
    ]
    assert (
        run(monkeypatch, *sweep, "--eval", f"lm-eval:t_choice,include_path={tasks},name=one") == 0
    )
    assert (
        run(
            monkeypatch, *sweep, "--eval", f"lm-eval:t_choice,shots=1,include_path={tasks},name=one"
        )
        == 1
    )
    assert "shots" in capsys.readouterr().err


def test_ifeval_over_local_prompts(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for package in ("langdetect", "immutabledict", "nltk"):
        pytest.importorskip(package)
    import nltk

    # nltk would fetch it when IFEval is imported; no rule of these prompts looks into it
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    monkeypatch.setattr(loading, "registered_tasks", lambda: pytest.fail("the local task will do"))
    where = importlib.util.find_spec("lm_eval")
    assert where is not None and where.origin is not None
    installed = Path(where.origin).parent / "tasks" / "ifeval" / "ifeval.yaml"
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in _PROMPTS), encoding="utf-8"
    )
    (tmp_path / "i_local.yaml").write_text(
        _IFEVAL.format(installed=installed, folder=tmp_path), encoding="utf-8"
    )
    one = build(f"lm-eval:i_local,chat=true,include_path={tmp_path}")
    engine.set_lambda(1.0)
    score = one(engine)
    assert (score.unit, score.n, one.higher_is_better) == ("prompt_level_strict_acc", 3, True)
    # it writes lower-case letters: no comma, no capitals, no quotation marks
    assert [item.score for item in score.items] == [1.0, 0.0, 0.0]
    assert score.details["i_local/inst_level_strict_acc"] == 0.5
    assert score.value == pytest.approx(1 / 3)
    assert capfd.readouterr().err == ""

"""Generated answers in a whole sweep: the demo pair, a suite of evaluators, and what the run folder
keeps of them."""

from __future__ import annotations

import json
import pathlib

import pytest

from examples.demo.follow import LONGEST, follow
from pa_fast.evals import build
from pa_fast.run import SweepSpec, run
from pa_fast.sweep import figure
from pa_fast.sweep.results import SweepResult

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "demo"
PAIR = (str(DEMO / "pair" / "base"), str(DEMO / "pair" / "instruct"))
LIMIT = 24
ALPACA = f"alpaca:instructions,max_new_tokens={LONGEST + 1}"
SUITE = f"""
- {{eval: generate, file: {DEMO}/requests.jsonl, max_new_tokens: {LONGEST + 1}, name: asked}}
- {{eval: alpaca, file: instructions.json, max_new_tokens: {LONGEST + 1}}}
- {{eval: icl, file: {DEMO}/fewshot.jsonl, mode: generate, shots: 3, sep: "\\n",
    max_new_tokens: 12, name: shown}}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (folder / "instructions.json").write_text(
        json.dumps([{"instruction": "rev owgny"}, {"instruction": "rev yopnlu"}])
    )
    evals = (str(folder / "suite.yaml"),)
    job = SweepSpec(
        *PAIR, "0,1", evals, str(folder / "run"), device="cpu", batch_size=LIMIT, limit=LIMIT
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "write", lambda result: None)  # nothing here looks at it
        return run(job)


def outputs(result: SweepResult, name: str) -> list[pathlib.Path]:
    return sorted((result.out / "outputs").rglob(name))


def test_every_point_is_there(swept: SweepResult) -> None:
    assert not swept.failures
    assert [(row.lam.key, row.evaluator) for row in swept.rows] == [
        (lam, name) for lam in "01" for name in ("asked", ALPACA, "shown")
    ]


def test_instruct_answers_and_stops_where_base_does_not(swept: SweepResult) -> None:
    scores = {(row.lam.key, row.evaluator): row.score for row in swept.rows}
    assert scores["0", "asked"] < 0.1 and scores["1", "asked"] > 0.8
    assert scores["0", ALPACA] == 0 and scores["1", ALPACA] == 1
    assert scores["0", "shown"] > 0.3, "few-shot is what base has learnt"


def test_what_the_model_wrote_is_kept(swept: SweepResult) -> None:
    asked = [
        json.loads(line)
        for path in outputs(swept, "outputs.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(asked) == 2 * 2 * LIMIT
    assert any(row["truncated"] for row in asked) and not all(row["truncated"] for row in asked)
    judged = [json.loads(path.read_text()) for path in outputs(swept, "model_outputs.json")]
    assert sorted(rows[0]["generator"] for rows in judged) == [
        "base+instruct@lam=0.0000",
        "base+instruct@lam=1.0000",
    ]
    instruct = next(rows for rows in judged if rows[0]["generator"].endswith("1.0000"))
    assert [(row["instruction"], row["output"]) for row in instruct] == [
        ("rev owgny", "yngwo"),
        ("rev yopnlu", "ulnpoy"),
    ]


def test_the_share_that_the_limit_cut_is_in_the_results(swept: SweepResult) -> None:
    shares = {(row.lam.key, row.evaluator): row.details["truncated"] for row in swept.rows}
    assert shares["0", "asked"] > 0.9 and shares["1", "asked"] < 0.1
    assert '"truncated": ' in (swept.out / "results.json").read_text()


def test_exact_match_is_that_of_the_demos_own_evaluator() -> None:
    import pa_fast

    model = pa_fast.load(*PAIR, device="cpu", batch_size=64, endpoint_check=False)
    model.set_lambda(1)
    score = build(f"generate:{DEMO / 'requests.jsonl'},max_new_tokens={LONGEST + 1}")(model)
    assert score.items == follow(model).items
    assert score.unit == "exact match, macro"

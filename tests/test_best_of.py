"""`merge --best-of`: the arguments of the merge at the chosen λ of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pa_fast
from pa_fast.base import Engine
from pa_fast.best_of import best_of, merged_line
from pa_fast.errors import PaFastError, RunError, UsageError
from tests.engines.architectures import write_pair
from tests.sweep.planted import Planted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("best")
    pair = [str(path) for path in write_pair(folder, "llama")]
    lm = pa_fast.load(*pair, rounding=pa_fast.Rounding("stochastic", 3))
    follow = Planted("follow", "monotone", 2000, 1)
    pa_fast.sweep(lm, "0:1:0.1", [Planted("icl"), follow], folder / "run", figure=False)
    return folder / "run", pair


def test_the_merge_is_the_live_model_at_the_chosen_λ(
    run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, pair = run
    answer, arguments = best_of(folder)
    assert arguments["lam"] == answer.chosen.key and 0.3 <= float(arguments["lam"]) <= 0.8
    assert [str(arguments[side]) for side in ("base", "instruct")] == pair
    pa_fast.merge(out=tmp_path / "merged", **arguments)
    recorded = json.loads((tmp_path / "merged/pa_fast.json").read_text())
    assert recorded["rounding"] == "stochastic" and recorded["seed"] == 3
    lm = pa_fast.load(*pair, rounding=pa_fast.Rounding("stochastic", 3))
    lm.set_lambda(float(answer.chosen))
    alone = pa_fast.load(tmp_path / "merged", tmp_path / "merged")
    for (name, live), other in zip(lm.model.named_parameters(), alone.model.parameters()):
        assert torch.equal(live, other), name


def test_objective_and_shares_choose_another_λ(run: tuple[Path, list[str]]) -> None:
    assert best_of(run[0], "follow")[1]["lam"] == "1"
    assert float(best_of(run[0], "icl", {"follow": 0.999})[1]["lam"]) > 0.6


def fixed(value: float) -> Any:
    def fixed(engine: Engine) -> float:
        return value

    return fixed


@pytest.mark.parametrize(
    ("lambdas", "evaluators", "line"),
    [
        ("0,0.5,1", [Planted("icl", "peak +5", 20_000)], "to be merged: λ = 0.5"),
        ("0,1", [Planted("icl", "monotone", 20_000)], "λ = 1, the instruct checkpoint itself"),
        ("0,1", [fixed(0.5)], "λ = 1, the instruct checkpoint itself"),
        (
            "0,0.5,1",
            [Planted("icl", "flat", 60, seed=2)],
            "for the best smoothed score: whether it is better than λ = 1 cannot be told",
        ),
        (
            "0,0.5",
            [fixed(0.5)],
            "λ = 0.5, for the best score: whether it is better than λ = 1 cannot be told",
        ),
        ("0", [fixed(0.5)], "λ = 0, the base checkpoint itself, for the best score: whether"),
    ],
)
def test_a_merge_says_what_cannot_be_told_and_what_is_unchanged(
    run: tuple[Path, list[str]], tmp_path: Path, lambdas: str, evaluators: list[Any], line: str
) -> None:
    lm = pa_fast.load(*run[1])
    pa_fast.sweep(lm, lambdas, evaluators, tmp_path, figure=False)
    assert line in merged_line(*best_of(tmp_path))


def test_checkpoints_that_changed_are_refused(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    other = run[1][1], run[1][0]
    with pytest.raises(RunError, match="is not the base checkpoint"):
        best_of(run[0], base=other[0], instruct=other[1])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"lossless": False, "store": "lowrank rank 4"}, UsageError, "an approximation"),
        ({"instruct": "delta 12"}, UsageError, "does not say where its instruct checkpoint is"),
        ({"base": None}, UsageError, "does not say where its base checkpoint is"),
        ({"rounding": "up?"}, RunError, "an unknown rounding"),
    ],
)
def test_runs_that_no_merge_equals(
    run: tuple[Path, list[str]],
    tmp_path: Path,
    change: dict[str, Any],
    kind: type[PaFastError],
    message: str,
) -> None:
    for name in ("run.json", "journal.jsonl"):
        (tmp_path / name).write_bytes((run[0] / name).read_bytes())
    shutil.copytree(run[0] / "items", tmp_path / "items")
    document = json.loads((tmp_path / "run.json").read_text())
    document["engine"] |= change
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(kind, match=message):
        best_of(tmp_path)

"""README.md: its eight lines of Python run, and its figures are those that were measured."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import pa_fast

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = max((ROOT / "bench" / "results").glob("*-cpu-2-cores-1b.csv"))
RESULTS = {
    "switch to another λ": ("one λ in place", "switch", "copy_(torch.lerp)"),
    "one λ of a sweep": (
        "sweep of 11 λ without",
        "pa_fast sweep, per λ",
        "mergekit + from_pretrained, per λ",
        "mergekit merge_state_dicts + copy_, per λ",
    ),
    "merge to disk": ("merge to disk", "pa-fast merge", "mergekit linear, bf16", "cp"),
    "load both sides": ("load to first λ", "load", "read both sides"),
    "lm-eval, 2,000 items": ("lm-eval, 2,000 items", "from the second λ", "simple_evaluate"),
    "icl, 24 items": ("icl, 24 items", "shared prefix", "plain path"),
    "inspect 70B shapes": ("inspect, 70B shapes", "pa-fast inspect"),
}
"""Of each row of the README's results: how its case begins in the CSV, and its ways."""


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo pair, with three λ and some of its items."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 8
    demo = ROOT / "examples" / "demo"
    for side in ("base", "instruct"):
        (tmp_path / f"{side}_dir").symlink_to(demo / "pair" / side)
    items = (demo / "fewshot.jsonl").read_text(encoding="utf-8").splitlines()
    pool = [row for row in items if '"pool"' in row]
    scored = [row for row in items if '"pool"' not in row]
    tasks = "\n".join([*pool, *scored[::24]])
    (tmp_path / "tasks.jsonl").write_text(tasks, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    seen = []
    exec(
        snippet.replace('"0:1:0.1"', '"0:1:0.5"'),
        {"my_score": lambda model, tokenizer: seen.append((model, tokenizer))},
    )
    assert len(seen) == 3 and seen[0][0] is seen[2][0], "one live model"
    result = pa_fast.SweepResult.load("runs/a")
    assert not result.failures and [row.lam.key for row in result.rows] == ["0", "0.5", "1"]
    assert pa_fast.verify("merged_dir", "base_dir", "instruct_dir").lam == "0.6"


@pytest.mark.parametrize("row", RESULTS)
def test_its_results_are_the_measured_ones(row: str) -> None:
    """Each figure is a median of the results file, to the digits that are shown."""
    case, *ways = RESULTS[row]
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    shown = re.findall(r"([\d.]+) s\b", line.partition("|")[2].partition("|")[2])
    with MEASURED.open(encoding="utf-8", newline="") as file:
        medians = {
            found["way"]: float(found["median_s"])
            for found in csv.DictReader(file)
            if found["case"].startswith(case)
        }
    assert len(shown) == len(ways)
    for text, way in zip(shown, ways):
        digits = len(text.partition(".")[2])
        assert float(text) == round(medians[way], digits), way
    assert line.count("|") == 4


def test_verbs_that_compute_on_the_demo_pair_do_not_spin_long_on_shared_cores() -> None:
    recipes = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    computing = [line for line in recipes if re.search(r"BIN\)/.*examples[./]demo", line)]
    assert len(computing) == 2
    assert all(line.startswith("\tGOMP_SPINCOUNT=10000 ") for line in computing)

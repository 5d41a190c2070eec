"""A new store is one class and one registry line: all that works with stores works with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pa_fast
from pa_fast.cli import app
from pa_fast.errors import CheckpointError, UsageError
from pa_fast.live.memory import FreeMemory
from pa_fast.live.planner import plan
from pa_fast.stores import registry
from pa_fast.stores.file import DeltaFile
from pa_fast.stores.store import TensorSize
from tests.stores import pairs
from tests.stores.toy import ToyStore

DEMO = Path(__file__).parents[2] / "examples" / "demo"
BASE, INSTRUCT = DEMO / "pair" / "base", DEMO / "pair" / "instruct"
ICL = f"icl:{DEMO / 'fewshot.jsonl'},shots=1,sep=\\n,name=icl"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.STORES, "toy", ToyStore)


def test_it_loads_sweeps_and_merges_bit_for_bit(tmp_path: Path) -> None:
    toy, dense = (pa_fast.load(BASE, INSTRUCT, store=store) for store in ("toy", "dense"))
    assert toy.identity["store"] == toy.weights.store == "toy" and toy.weights.lossless
    for lam in (0.3, 1.0, 0.0):
        toy.set_lambda(lam)
        dense.set_lambda(lam)
        assert toy.weights.checksum() == dense.weights.checksum() and toy.weights.verify()
        assert toy.weights.effective_lambda() == dense.weights.effective_lambda()
    tables = []
    for name, lm in (("toy", toy), ("dense", dense)):
        pa_fast.sweep(lm, "0:1:0.5", ICL, tmp_path / name, limit=4, figure=False)
        tables.append((tmp_path / name / "results.csv").read_text())
    assert tables[0] == tables[1]
    toy.set_lambda(0.6)
    toy.save(tmp_path / "merged")
    assert pa_fast.verify(tmp_path / "merged", BASE, INSTRUCT).ok


def test_it_is_a_delta_file_and_the_report_says_what_it_costs(tmp_path: Path) -> None:
    report = pa_fast.encode(BASE, INSTRUCT, tmp_path / "delta", "toy")
    assert report.name == report.options == "toy" and report.lossless
    assert {row.kind for row in report.tensors} == {"steps"} and report.bytes_per_parameter == 2
    with DeltaFile.open(tmp_path / "delta") as file:
        assert file.description.store == "toy" and file.nbytes == report.bytes
    opened, bound = pa_fast.load(BASE, delta=tmp_path / "delta"), pa_fast.load(BASE, INSTRUCT)
    for lm in (opened, bound):
        lm.set_lambda(0.7)
    assert opened.weights.checksum() == bound.weights.checksum()
    with pytest.raises(UsageError, match="toy takes no options"):
        pa_fast.encode(BASE, INSTRUCT, tmp_path / "other", "toy", rank=3)
    # of a store that nobody registered, files are refused
    del registry.STORES["toy"]
    with pytest.raises(CheckpointError, match="`kind` is `steps`"):
        DeltaFile.open(tmp_path / "delta")
    registry.STORES["toy"] = ToyStore


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    sides = [str(BASE), str(INSTRUCT)]
    encoded = CliRunner().invoke(
        app, ["encode", *sides, "--format", "toy", "--out", str(tmp_path / "delta"), "--json"]
    )
    assert encoded.exit_code == 0 and json.loads(encoded.stdout)["name"] == "toy"
    options = ["--store", "toy", "--lambdas", "0,1", "--eval", ICL, "--limit", "2"]
    swept = CliRunner().invoke(app, ["sweep", *sides, *options, "--out", str(tmp_path / "run")])
    assert swept.exit_code == 0, swept.output
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["engine"]["store"] == "toy"


def test_it_is_planned_for_as_it_estimates() -> None:
    sizes = [TensorSize(f"layer.{n}", 10**9, 2 * 10**9) for n in range(8)]
    fits = plan(sizes, "toy", "auto", FreeMemory(20 * 10**9, 80 * 10**9))
    assert isinstance(fits.store, ToyStore) and not fits.host
    assert "about 8 GB where dense takes 16 GB" in fits.reason
    short = plan(sizes, "toy", "auto", FreeMemory(9 * 10**9, 80 * 10**9))
    assert isinstance(short.store, ToyStore) and 0 < len(short.host) < 8


def test_rules_and_foreign_writes_are_followed_and_found() -> None:
    base, instruct = pairs.pair(changed=1.0)
    live = pairs.live_like(base)
    weights = pa_fast.LiveWeights.bind(live, base, instruct, "toy")
    rule = pa_fast.LambdaRule([{"match": "a", "times": 0.5}])
    weights.set_lambda(rule.at(0.8))
    assert weights.verify()
    live["a"].view(torch.int16)[3, 4] ^= 1
    assert weights.changed() == ["a"]
    weights.set_lambda(0.4)
    assert weights.verify()

"""Whatever stands where a path belongs is refused in one message, by every public function."""

from __future__ import annotations

import inspect as inspecting
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast.errors import CheckpointError, UsageError
from pa_fast.rules import LambdaRule
from pa_fast.run import SweepSpec, run
from pa_fast.stores.file import DeltaFile
from pa_fast.sweep.report import report

DEMO = Path(__file__).parents[1] / "examples" / "demo"
BASE, INSTRUCT = DEMO / "pair" / "base", DEMO / "pair" / "instruct"
NOT_PATHS = (None, 5, b"x", "", "a\0b", [])


@pytest.fixture(scope="module")
def lm() -> Any:
    return pa_fast.load(BASE, INSTRUCT, device="cpu", endpoint_check=False)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "sweep.out": lambda lm, path: pa_fast.sweep(lm, [0], lambda engine: 1.0, out=path),
    "sweep.evaluators": lambda lm, path: pa_fast.sweep(lm, [0], path, out="run"),
    "evaluator.given": lambda lm, path: pa_fast.evaluator(path),
    "merge.base": lambda lm, path: pa_fast.merge(path, INSTRUCT, 0.5, "merged"),
    "merge.instruct": lambda lm, path: pa_fast.merge(BASE, path, 0.5, "merged"),
    "merge.rule": lambda lm, path: pa_fast.merge(BASE, INSTRUCT, 0.5, "merged", rule=path),
    "merge.out": lambda lm, path: pa_fast.merge(BASE, INSTRUCT, 0.5, path),
    "inspect.base": lambda lm, path: pa_fast.inspect(path, INSTRUCT),
    "inspect.instruct": lambda lm, path: pa_fast.inspect(BASE, path),
    "verify.merged": lambda lm, path: pa_fast.verify(path, BASE, INSTRUCT, 1),
    "verify.base": lambda lm, path: pa_fast.verify(INSTRUCT, path, INSTRUCT, 1),
    "verify.instruct": lambda lm, path: pa_fast.verify(INSTRUCT, BASE, path, 1),
    "encode.base": lambda lm, path: pa_fast.encode(path, INSTRUCT, "delta"),
    "encode.instruct": lambda lm, path: pa_fast.encode(BASE, path, "delta"),
    "encode.out": lambda lm, path: pa_fast.encode(BASE, INSTRUCT, path),
    "encode.text": lambda lm, path: pa_fast.encode(BASE, INSTRUCT, "delta", text=path),
    "export_lora.delta": lambda lm, path: pa_fast.export_lora(path, BASE, "lora"),
    "export_lora.out": lambda lm, path: pa_fast.export_lora("delta", BASE, path),
    "load.base": lambda lm, path: pa_fast.load(path, INSTRUCT),
    "load.instruct": lambda lm, path: pa_fast.load(BASE, path),
    "load.delta": lambda lm, path: pa_fast.load(BASE, delta=path),
    "load.tokenizer": lambda lm, path: pa_fast.load(BASE, INSTRUCT, tokenizer=path),
    "load.rule": lambda lm, path: pa_fast.load(BASE, INSTRUCT, rule=path),
    "LiveWeights.open": lambda lm, path: pa_fast.LiveWeights.open({}, {}, path),
    "DeltaFile.open": lambda lm, path: DeltaFile.open(path),
    "LambdaModel.save": lambda lm, path: lm.save(path),
    "SweepResult.load": lambda lm, path: pa_fast.SweepResult.load(path),
    "LambdaRule.load": lambda lm, path: LambdaRule.load(path),
    "report": lambda lm, path: report([path]),
    "sweep --out": lambda lm, path: run(SweepSpec("a", "b", "0", ("python:m:f",), path)),
}
OPTIONAL = {"merge.rule", "encode.text", "load.tokenizer", "load.rule"}  # None: not given
ELSEWHERE = {"export_lora.base", "inspect.rule", "verify.rule"}
"""Read by the same code as others of the table."""


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_path_is_refused(
    name: str, lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given in NOT_PATHS:
        if given is None and name in OPTIONAL:
            continue
        with pytest.raises(UsageError) as caught:
            CALLS[name](lm, given)
        assert caught.value.hint, given
    assert not os.listdir(tmp_path), "refused before anything is written"


@pytest.mark.parametrize("name", ["LiveWeights.open", "DeltaFile.open", "load.delta"])
def test_a_delta_that_is_missing_or_a_folder_is_refused(name: str, lm: Any, tmp_path: Path) -> None:
    for given, message in (
        (tmp_path / "nothing", "nothing: cannot be opened: No such file"),
        (BASE, "base: a folder, expected a delta file"),
        (BASE / "model-00001-of-00002.safetensors", "a safetensors file, but no delta"),
        (BASE / "config.json", "config.json: "),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            CALLS[name](lm, given)
        assert caught.value.hint and "\n" not in str(caught.value).split("\n\nhint")[0]


def test_the_table_has_every_path_of_the_public_functions() -> None:
    found = {
        f"{name}.{parameter.name}"
        for name in pa_fast.__all__
        if inspecting.isfunction(function := getattr(pa_fast, name))
        for parameter in inspecting.signature(function).parameters.values()
        if any(kind in str(parameter.annotation) for kind in ("Path", "RuleLike", "Given"))
    }
    known = {name for name in CALLS if "." in name and name[0].islower()}
    assert found == known | ELSEWHERE

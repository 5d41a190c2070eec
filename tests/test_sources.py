"""A source is only read: no verb writes into its folder, under whatever name it is reached."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import pa_fast
from pa_fast import cli
from pa_fast.errors import OutputError
from pa_fast.quality import delta_map

PAIR = Path(__file__).parents[1] / "examples" / "demo" / "pair"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(PAIR, tmp_path / "pair")
    (tmp_path / "link").symlink_to(tmp_path / "pair" / "base")
    (tmp_path / "notes.txt").write_text("abc>cba\n" * 9)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


SIDES = ["pair/base", "pair/instruct"]
VERBS = {
    "inspect": ["inspect", *SIDES, "--figure"],
    "merge": ["merge", *SIDES, "--lambda", "0.5", "--out"],
    "sweep": ["sweep", *SIDES, "--lambdas", "0", "--eval", "perplexity:notes.txt", "--out"],
    "encode": ["encode", *SIDES, "--format", "sparse", "--out"],
    "lora": ["lora", "factors", "pair/base", "--partial", "--out"],
}


@pytest.mark.parametrize("out", ["pair/base/config.json", "pair/base/new", "link/new"])
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_writes_into_a_source(
    verb: str,
    out: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if verb == "lora":
        pa_fast.encode(*SIDES, "factors", "lowrank", rank=2)
    before = listed(place / "pair")
    monkeypatch.setattr(sys, "argv", ["pa-fast", *VERBS[verb], out])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert end.value.code == 1 and "lies in the source" in said.err and "\n\nhint: " in said.err
    assert said.out == "" and listed(place / "pair") == before


def test_no_function_writes_into_a_source(place: Path) -> None:
    before = listed(place / "pair")
    lm: Any = pa_fast.load(*SIDES, device="cpu", endpoint_check=False)
    for side in SIDES:
        with pytest.raises(OutputError, match="lies in the source"):
            pa_fast.sweep(lm, [0], lambda engine: 1.0, out=os.path.join(side, "run"))
        with pytest.raises(OutputError, match="lies in the source"):
            lm.save(os.path.join(side, "merged"))
        with pytest.raises(OutputError, match="lies in the source"):
            delta_map.write(pa_fast.inspect(*SIDES, sample=True), os.path.join(side, "map"))
    assert listed(place / "pair") == before
    delta_map.write(pa_fast.inspect(*SIDES, sample=True), "pair/base-map")
    assert (place / "pair" / "base-map.png").exists()

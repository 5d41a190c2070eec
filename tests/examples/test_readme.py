"""The notebook snippet of the README, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import pa_fast

ROOT = Path(__file__).parents[2]


def test_from_load_to_the_best_λ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    blocks = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    (snippet,) = [block for block in blocks if "pa_fast.sweep(lm" in block]
    assert len([line for line in snippet.splitlines() if line]) <= 10
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"pa_fast": pa_fast}
    exec(snippet, names)
    result = names["result"]
    assert not result.failures and len(result.rows) == 6 and result.evaluators == ("icl", "written")
    assert capsys.readouterr().out.startswith(f"{float(result.best('icl').lam)} ")
    assert pa_fast.SweepResult.load("runs/a").rows == result.rows

"""What package indexes get: a README that stands alone, bounds and files by name."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup() -> Any:
    spec = importlib.util.spec_from_file_location("pa_fast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    here = [
        target.partition("#")[0]
        for target in targets((ROOT / "README.md").read_text("utf-8"))
        if "://" not in target
    ]
    assert len(here) > 10 and not [target for target in here if not (ROOT / target).exists()]


def test_on_an_index_no_link_or_image_leads_nowhere(setup: Any) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    alone = setup.for_index(readme, None)
    assert not [target for target in targets(alone) if not target.startswith(("http", "#"))]
    assert "![" not in alone and "docs/images/demo.png" in alone and "embedding.md" in alone
    linked = setup.for_index(readme, "https://example.org/us/it")
    assert "](https://example.org/us/it/raw/main/docs/images/demo.png)" in linked
    assert "](https://example.org/us/it/blob/main/docs/embedding.md" in linked
    assert not [target for target in targets(linked) if not target.startswith(("http", "#"))]
    assert (
        setup.for_index("[`a[0]`](b.md) and [c](#d) and [e](https://f)", None)
        == "`a[0]` and [c](#d) and [e](https://f)"
    )


def test_a_source_distribution_has_each_folder_whole() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text("utf-8")
    for folder in ("bench", "docs", "examples", "tests"):
        assert f"graft {folder}\n" in manifest
    for name in (
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "constraints-oldest.txt",
        "mkdocs.yml",
    ):
        assert name in manifest and (ROOT / name).exists()

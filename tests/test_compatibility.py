"""What `make compat` keeps: each environment's last result, failures by name, and never
another's."""

from __future__ import annotations

import pathlib

import pytest

from tests import compatibility

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_one"/>
<testcase classname="tests.a" name="test_two[x]"><failure message="no">no</failure></testcase>
<testcase classname="tests.b" name="test_three"><error message="no">no</error></testcase>
<testcase classname="tests.b" name="test_four"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted_and_failures_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    found = compatibility.outcome(tmp_path / "report.xml")
    assert found == (1, 2, 1, ["tests.a::test_two[x]", "tests.b::test_three"])
    text = compatibility.block("newest", "tests/a", found, {"transformers": "5.24.0"}, "2026-01-02")
    assert "**1 passed, 2 failed, 1 skipped** on 2026-01-02: `pytest tests/a`" in text
    assert "transformers 5.24.0" in text and "- `tests.b::test_three`" in text


def test_each_environment_keeps_its_own_part_of_the_page() -> None:
    page = compatibility.PAGE.read_text("utf-8")
    for label in compatibility.ROWS:
        page = compatibility.written(page, label, f"what came of {label} \\1")
    for label in compatibility.ROWS:
        assert page.count(f"what came of {label} \\1") == 1
        assert compatibility.written(page, label, "x").count("what came of") == 1
    with pytest.raises(ValueError, match="no marks"):
        compatibility.written(page, "oldest", "x")


def test_every_package_that_the_kept_result_names_is_one_that_is_installed_or_said_to_be_none() -> (
    None
):
    found = compatibility.versions()
    assert found.keys() == {"Python", *compatibility.PACKAGES}
    assert found["transformers"] != "none" and found["typer"] != "none"

"""What `make compat` keeps: each environment's last result, failures by name, and never
another's."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement

from tests import compatibility

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    text = compatibility.block("tests/a", found, {"transformers": "5.24.0"}, "2026-01-02")
    assert "**1 passed, 2 failed, 1 skipped** on 2026-01-02: `pytest tests/a`" in text
    assert "transformers 5.24.0" in text and "- `tests.b::test_three`" in text


def test_each_environment_keeps_its_own_part_of_the_page() -> None:
    page = compatibility.PAGE.read_text("utf-8")
    known = re.findall(r"^<!-- (\S+):begin -->$", page, re.M)
    assert {name.partition("-")[0] for name in known} == {"oldest", "pinned", "newest"}
    for name in [*known, "newest-python3.99"]:
        page = compatibility.written(page, name, f"what came of {name} \\1")
    for name in [*known, "newest-python3.99"]:
        assert page.count(f"### {name}\n") == page.count(f"what came of {name} \\1") == 1
        assert compatibility.written(page, name, "x").count("what came of") == len(known)
    with pytest.raises(ValueError, match="no mark"):
        compatibility.written("", "oldest", "x")


def test_the_oldest_environment_has_the_lowest_versions_that_are_declared() -> None:
    project = tomllib.loads((compatibility.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras, declared = project["optional-dependencies"], []
    left = [*project["dependencies"], *extras["dev"]]
    while left:
        each = Requirement(left.pop())
        if each.name == project["name"]:
            left += [text for name in each.extras for text in extras[name]]
        else:
            declared.append(each)
    text = (compatibility.ROOT / "constraints-oldest.txt").read_text("utf-8")
    tried = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    lowest = {
        each.name: (spec.version, str(each.marker))
        for each in declared
        for spec in each.specifier
        if spec.operator == ">="
    }
    assert {each.name for each in declared} == lowest.keys()
    assert {
        each.name: (str(each.specifier).removeprefix("=="), str(each.marker)) for each in tried
    } == lowest


def test_every_package_that_the_kept_result_names_is_one_that_is_installed_or_said_to_be_none() -> (
    None
):
    found = compatibility.versions()
    assert found.keys() == {"Python", *compatibility.PACKAGES}
    assert found["transformers"] != "none" and found["typer"] != "none"


def test_the_page_lists_each_extra_and_what_the_tests_need_of_packages() -> None:
    project = tomllib.loads((compatibility.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    section = (
        compatibility.PAGE.read_text("utf-8").partition("## Extras\n")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| .+ \|$", section, re.M)
    listed = {name: brings for names, brings in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed.keys() == extras.keys()
    for each in map(Requirement, extras["dev"]):
        wanted = [f"`{name}`" for name in each.extras] or [each.name]
        assert set(wanted) <= set(listed["dev"].split(", ")), each

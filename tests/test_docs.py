"""The documentation: links lead somewhere, the API pages have every public name, the notebook runs
as it is shown, and the site builds without a warning."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect as inspecting
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pa_kernels
import pytest
import typer
import yaml

import pa_fast
from pa_fast import cli
from tests import patience
from tests.programs import Program

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOK = DOCS / "tutorial.ipynb"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", t.encode("ascii", "ignore").decode()) for t in titles]
    return {re.sub(r"[-\s]+", "-", title.strip().lower()) for title in plain}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES, NOTEBOOK], ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if page.parent != ROOT:
            assert file.resolve().is_relative_to(DOCS), f"{target} is outside of the site"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in [*PAGES, NOTEBOOK]:
        assert re.search(rf"[ :]{re.escape(str(page.relative_to(DOCS)))}$", menu, re.M), page


@pytest.mark.parametrize(
    ("package", "page"), [(pa_fast, "api.md"), (pa_kernels, "kernels.md")], ids=["api", "kernels"]
)
def test_the_reference_has_every_public_name(package: Any, page: str) -> None:
    named = re.findall(r"^::: (\S+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    public = {f"{package.__name__}.{name}" for name in package.__all__} - {"pa_fast.__version__"}
    if package is pa_fast:  # shown with the whole tree of errors
        public = public - {"pa_fast.PaFastError"} | {"pa_fast.errors"}
    headed = {  # functions whose public name is a module's, too
        "pa_fast.sweeping.sweep": "pa_fast.sweep",
        "pa_kernels.checksum.checksum": "pa_kernels.checksum",
    }
    assert sorted(headed.get(name, name) for name in named) == sorted(public)


def documented() -> dict[str, Any]:
    """Public functions and methods by name, and classes whose docstring says what they take."""
    found: dict[str, Any] = {}
    for package in (pa_fast, pa_kernels, pa_kernels.reference):
        for name in getattr(package, "__all__", vars(package)):
            value = getattr(package, name)
            if getattr(value, "__module__", "").startswith(("pa_fast", "pa_kernels")):
                found[name] = value
                for method, member in vars(value).items() if inspecting.isclass(value) else ():
                    if inspecting.isfunction(member) and not method.startswith("_"):
                        found[f"{name}.{method}"] = member
    return found


@pytest.mark.parametrize("name", documented())
def test_documented_arguments_are_those_of_the_signature(name: str) -> None:
    """mkdocs cannot tell: it does not know the form `base, instruct: …`."""
    value = documented()[name]
    section = re.search(
        r"^Args:\n((?:[ ]+.*\n|\n)+)", f"{inspecting.getdoc(value)}\n", re.MULTILINE
    )
    if section is None or not callable(value):
        return
    names = re.findall(r"^ {4}([\w*][\w*, ]*):", section[1], re.MULTILINE)
    given = {part.strip(" *") for entry in names for part in entry.split(",")}
    assert given and given <= set(inspecting.signature(value).parameters)


def cells(kind: str) -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_stored_outputs_of_the_notebook_are_of_one_run_from_the_first_cell_on() -> None:
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds, "a figure and a table are stored"


def run_cells(sources: list[str], found: Path) -> None:
    """Write what each cell prints, and the scores at the end, to `found`."""
    names: dict[str, Any] = {}
    printed = []
    for source in sources:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(source, names)
        printed.append(out.getvalue())
    found.write_text(json.dumps([printed, json.loads(names["scores"].to_json())]))


def run_notebook(folder: Path, changes: dict[str, str]) -> tuple[list[str], Any]:
    """What each code cell prints, in a process of its own below `folder`, and the scores at its
    end."""
    sources = ["".join(cell["source"]) for cell in cells("code")]
    for old, new in changes.items():
        assert sum(source.count(old) for source in sources) == 1, old
        sources = [source.replace(old, new) for source in sources]
    (folder / "docs").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    program = Program(
        run_cells,
        sources,
        folder / "found.json",
        folder=folder / "docs",
        environment={"MPLBACKEND": "agg"},
    )
    _, errors = patience.communicate(program)
    assert program.returncode == 0, errors
    printed, scores = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return printed, scores


QUICK = {
    'LAMBDAS = "0:1:0.1"': 'LAMBDAS = "0:1:0.5"',
    "LIMIT = None": "LIMIT = 16",
    "limit=LIMIT,": "limit=LIMIT, figure=False,",
}


def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    printed, scores = run_notebook(tmp_path, QUICK)
    assert scores.keys() == {"few-shot", "requests", "ends"}
    assert all(column.keys() == {"0.0", "0.5", "1.0"} for column in scores.values())
    proofs = [line for text in printed for line in text.splitlines() if line.endswith("True")]
    assert len(proofs) == 3, printed
    assert printed[1] == "".join(cells("code")[1]["outputs"][0]["text"])
    assert (tmp_path / "runs" / "tutorial-merged" / "pa_fast.json").exists()


@pytest.mark.slow
def test_the_notebook_measures_what_it_shows(tmp_path: Path) -> None:
    """Up to one reply in 32, or six items in 192, which another processor may round differently."""
    pytest.importorskip("pandas")
    _, scores = run_notebook(tmp_path, {})
    shown = next(
        "".join(output["data"]["text/plain"])
        for cell in cells("code")
        if cell["source"][-1] == "scores.round(3)"
        for output in cell["outputs"]
    ).splitlines()
    columns = shown[0].split()[1:]
    for line in shown[2:]:
        lam, *values = line.split()
        for name, value in zip(columns, values, strict=True):
            assert scores[name][lam] == pytest.approx(float(value), abs=0.033), (lam, name)


def test_what_pages_show_of_programs_is_there() -> None:
    named = [
        name
        for page in PAGES
        for name in re.findall(
            r"^<!-- source: (\S+) -->$", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert len(named) > 5 and all((ROOT / name).exists() for name in named)


def test_the_help_of_every_verb_is_on_the_page_of_the_command_line() -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    verbs = typer.main.get_command(cli.app).commands
    assert set(verbs) == set(re.findall(r"^<!-- help: (\w+) -->$", page, re.MULTILINE))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings")),
    reason="needs the docs extra",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'(?:href|src)="[^":]+\.md[#"]', html), page
        assert "<!-- help:" not in html and "<!-- source:" not in html, page
        for host in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', html):
            raise AssertionError(f"{page} loads {host}")


def test_the_configuration_of_the_site_says_that_warnings_count() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)["validation"]
    assert all(value == "warn" for part in found.values() for value in part.values())

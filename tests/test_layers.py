"""Imports point down, within a package in no circle, and one name is one type: read from the
sources."""

from __future__ import annotations

import ast
import graphlib
import pathlib
import subprocess
import sys
from collections.abc import Collection, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GROUND = {"errors", "files", "foreign", "question", "terminal", "units"}
FLOOR = {"base", "device", "rounding", "rules", "pa_kernels"} | GROUND
ALLOWED: dict[str, set[str]] = {
    "pa_kernels": set(),
    "foreign": set(),
    "errors": {"foreign"},
    "terminal": {"foreign"},
    "question": {"errors", "foreign"},
    "units": {"errors"},
    "files": {"errors", "foreign"},
    "base": {"errors"},
    "device": {"errors"},
    "rounding": {"errors"},
    "rules": {"base", "errors", "files", "foreign"},
    "checkpoint": FLOOR,
    "stores": {"checkpoint"} | FLOOR,
    "live": {"stores", "checkpoint"} | FLOOR,
    "engines": {"live", "stores", "checkpoint"} | FLOOR,
    "evals": {"base"} | GROUND,
    "stats": {"base"} | GROUND,
    "sweep": {"stats", "base"} | GROUND,
}
ALLOWED["sweeping"] = {"evals", "sweep", "base"} | GROUND
ALLOWED["run"] = {"engines", "evals", "sweep", "live", "stores", "checkpoint"} | FLOOR
ALLOWED["report"] = {"sweep", "stats", "checkpoint"} | FLOOR
ALLOWED["trackers"] = {"sweep"} | FLOOR
ALLOWED["best_of"] = {"sweep", "stats", "checkpoint"} | FLOOR
ALLOWED["launch"] = {"run", "sweep"} | FLOOR
ALLOWED["lm_eval"], ALLOWED["ray"] = {"evals"}, {"launch"}
ALLOWED["vllm"] = ALLOWED["sglang"] = {"engines"}
ALLOWED["quality"] = ALLOWED["run"]
ALLOWED["encoding"] = ALLOWED["run"] | {"quality"}
ALLOWED["throughput"] = {"live", "stores", "checkpoint"} | FLOOR
ALLOWED["cli"] = ALLOWED["run"] | {
    "run",
    "report",
    "best_of",
    "encoding",
    "quality",
    "launch",
    "throughput",
}
ALLOWED["cli"] |= {"trackers", "__init__"}
EMBEDDED_STACKS = {"lm_eval", "ray", "vllm", "sglang"}
SUBCLASSES = {"evals/lm_eval/model.py", "evals/lm_eval/vllm_model.py"}
"""Modules that extend a class of an embedded stack; they are imported inside functions only."""


CIRCULAR = {
    ("pa_fast.throughput.ceilings", "pa_fast.throughput"),
    ("pa_fast.throughput.switches", "pa_fast.throughput"),
}
"""Imports that close a circle and may: parts that take a value class from their own package."""


def part_of(module: str) -> str | None:
    """The row of the table that `module` stands in, or None for foreign packages."""
    head, _, rest = module.partition(".")
    if head == "pa_kernels":
        return head
    return (rest.split(".")[0] or "__init__") if head == "pa_fast" else None


def imports(path: pathlib.Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the layer"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "pa_fast"
                else []
            )
            found += [(node.lineno, name) for name in names or [node.module or ""]]
    return found


def breaches(path: pathlib.Path, row: str) -> list[str]:
    wrong = []
    for line, module in imports(path):
        target = part_of(module)
        # `from pa_fast import X` names either a part or a public name; public names belong to the
        # layer above all
        if target is not None and target != row and target not in ALLOWED[row]:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {row} may not import {module}")
    return wrong


def modules() -> dict[str, pathlib.Path]:
    """Both packages' modules by name; a package is its `__init__.py`."""
    found = {}
    for root, package in ((ROOT / "kernels", "pa_kernels"), (ROOT, "pa_fast")):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[: -1 if parts[-1] == "__init__" else None])] = path
    return found


def imported(path: pathlib.Path, known: Collection[str]) -> set[str]:
    """Modules among `known` that a file imports anywhere, functions and type checking included:
    `from a import b` is a.b where there is one, else a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in known else node.module for name in whole}
    return names & set(known)


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one again at its end; none if none
    do."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def types_of(source: str) -> set[str]:
    """Names of the classes and type aliases at the top of a module."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            # `Shape = tuple[int, ...]`: named like a class, and neither a constant nor a TypeVar
            targets = [t.id for t in node.targets if isinstance(t, ast.Name)]
            names |= {
                name
                for name in targets
                if name[0].isupper() and len(name) > 1 and not name.isupper()
            }
    return names


def shared_types(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of types that several of `sources`, module → text, define, with these modules."""
    owners: dict[str, list[str]] = {}
    for module, source in sources.items():
        for name in types_of(source):
            owners.setdefault(name, []).append(module)
    return {name: modules for name, modules in owners.items() if len(modules) > 1}


def sources() -> list[tuple[pathlib.Path, str]]:
    found = [(p, "pa_kernels") for p in (ROOT / "kernels" / "pa_kernels").rglob("*.py")]
    for path in (ROOT / "pa_fast").rglob("*.py"):
        row = path.relative_to(ROOT / "pa_fast").parts[0].removesuffix(".py")
        if row not in {"__init__", "__main__"}:
            found.append((path, row))
    return found


@pytest.mark.parametrize(
    ("path", "row"), sources(), ids=lambda value: str(getattr(value, "name", value))
)
def test_imports_point_down(path: pathlib.Path, row: str) -> None:
    assert row in ALLOWED, f"{row} is not in the table of layers"
    assert not breaches(path, row)


def test_a_breach_is_found(tmp_path: pathlib.Path) -> None:
    bad = ROOT / "pa_fast" / "sweep" / "driver.py"
    assert breaches(bad, "units"), "the check must be able to fail"


def test_no_modules_import_one_another_in_a_circle() -> None:
    known = modules()
    graph = {
        name: {other for other in imported(path, known) if (name, other) not in CIRCULAR}
        for name, path in known.items()
    }
    assert not circle(graph)
    # the check must be able to fail, also for an import inside a function
    assert "pa_kernels.dense_triton" in graph["pa_kernels.dense"]
    graph["pa_kernels.dense_triton"].add("pa_kernels.dense")
    assert set(circle(graph)) == {"pa_kernels.dense", "pa_kernels.dense_triton"}


def test_no_two_types_share_a_name() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    assert not shared_types(texts)
    # the check must be able to fail, for a class and for an alias
    texts |= {"one": "class Journal: ...", "two": "Store = int\nSTORE = 1\nT = int"}
    assert shared_types(texts) == {
        "Journal": ["pa_fast.sweep.journal", "one"],
        "Store": ["pa_fast.stores.store", "two"],
    }


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_does_not_take_our_kernels_folder_for_another_package() -> None:
    # transformers probes for a distribution whose import name is `kernels`; a bare folder of that
    # name in the working directory is found by find_spec, and must not count as that package.
    code = (
        "import sys; sys.path.insert(0, '');"
        "import transformers;"
        "from transformers.utils import is_kernels_available;"
        "import transformers.integrations.hub_kernels;"
        "import importlib.metadata as m\n"
        "try: m.version('kernels'); real = True\n"
        "except m.PackageNotFoundError: real = False\n"
        "assert is_kernels_available() == real, 'our folder was taken for the kernels package'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "pa_fast",
        "pa_fast.cli",
        "pa_fast.base",
        "pa_fast.checkpoint.merge",
        "pa_fast.checkpoint.inspect",
        "pa_fast.sweep",
    ],
)
def test_light_imports_load_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'matplotlib'}} &"
        " set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=_path()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_eval_stacks_are_imported_only_inside_functions() -> None:
    lazy = {"pa_fast." + name.removesuffix(".py").replace("/", ".") for name in SUBCLASSES}
    for path, _ in sources():
        if any(path == ROOT / "pa_fast" / name for name in SUBCLASSES):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", "") or ""]
            )
            assert not {n.split(".")[0] for n in names} & EMBEDDED_STACKS, path
            assert not set(names) & lazy, path


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}

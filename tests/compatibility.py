"""Run the suite in this environment and keep what came of it in docs/compatibility.md: `make
compat`.

python -m tests.compatibility ENVIRONMENT [PYTEST ARGUMENTS]  # the part to write: newest-python3.13
"""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = (
    *(
        "torch",
        "transformers",
        "triton",
        "typer",
        "click",
        "rich",
        "huggingface_hub",
        "numpy",
        "scipy",
        "safetensors",
        "peft",
    ),
    *("lm_eval", "ray", "numba", "accelerate", "matplotlib", "pyyaml"),
)
END = "<!-- environments:end -->"
"""Where the page has the next environment's part."""


def versions() -> dict[str, str]:
    """Version of each package of PACKAGES that is installed here, and of Python."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def outcome(report: pathlib.Path) -> tuple[int, int, int, list[str]]:
    """Passed, failed and skipped tests of a JUnit report, and the names of the failed."""
    failed, skipped, total = [], 0, 0
    for case in ElementTree.parse(report).iter("testcase"):
        total += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        skipped += case.find("skipped") is not None
    return total - len(failed) - skipped, len(failed), skipped, failed


def block(
    what: str, result: tuple[int, int, int, list[str]], found: dict[str, str], day: str
) -> str:
    """The part of the page on one environment."""
    passed, failed, skipped, names = result
    command = f"pytest {what}".strip()
    lines = [
        f"**{passed} passed, {failed} failed, {skipped} skipped** on {day}: `{command}`.",
        "",
        ", ".join(f"{name} {version}" for name, version in found.items()),
    ]
    lines += ["", "Failed:", *(f"- `{name}`" for name in names)] if names else []
    return "\n".join(lines)


def written(page: str, environment: str, text: str) -> str:
    """`page` with `text` as the part of `environment`: in the place of its last one, or at the
    end."""
    begin, end = f"<!-- {environment}:begin -->", f"<!-- {environment}:end -->"
    if begin not in page:
        if END not in page:
            raise ValueError(f"{PAGE} has no mark {END}")
        page = page.replace(END, f"### {environment}\n{begin}\n{end}\n\n{END}")
    return re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{text}\n{end}",
        page,
        flags=re.S,
    )


def main(environment: str, arguments: list[str]) -> int:
    if not re.fullmatch(r"(oldest|pinned|newest)(-[\w.]+)?", environment):
        print(
            f"write an environment, such as newest-python3.13, not `{environment}`", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        code = subprocess.run(
            [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments], cwd=ROOT
        ).returncode
        if not report.exists() or code not in (0, 1):
            print(f"pytest ended with {code}; {PAGE} is as it was", file=sys.stderr)
            return 1
        result = outcome(report)
    day = datetime.date.today().isoformat()
    PAGE.write_text(
        written(
            PAGE.read_text("utf-8"),
            environment,
            block(" ".join(arguments), result, versions(), day),
        ),
        "utf-8",
    )
    print(
        f"{result[0]} passed, {result[1]} failed, {result[2]} skipped: kept in"
        f" {PAGE.relative_to(ROOT)}"
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]))

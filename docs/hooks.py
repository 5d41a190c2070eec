"""MkDocs hook: marks on pages become what they name.

`<!-- help: VERB -->` is what `pa-fast VERB --help` prints, `<!-- source: FILE -->` a program of the
repository.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
HELP = re.compile(r"^<!-- help:(?: (\w+))? -->$", re.MULTILINE)
SOURCE = re.compile(r"^<!-- source: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    markdown = HELP.sub(lambda mark: f"```text\n{help_text(mark[1])}```", markdown)
    return SOURCE.sub(lambda mark: f"```python\n{(ROOT / mark[1]).read_text('utf-8')}```", markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with what became of each page: links of a notebook are left as they were."""
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(r'href="([\w/-]+)\.md(#[^"]*)?"', r'href="\1.html\2"', html)
    return html


def help_text(verb: str | None) -> str:
    """The help of `verb`, or of `pa-fast` itself, as plain text."""
    command = [sys.executable, "-m", "pa_fast", *([verb] if verb else []), "--help"]
    plain = {"TYPER_USE_RICH": "0", "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run(
        command, env={**os.environ, **plain}, capture_output=True, text=True, check=True
    )
    return done.stdout

"""MkDocs hook: `<!-- help: VERB -->` on a page becomes what `pa-fast VERB --help` prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

MARK = re.compile(r"^<!-- help:(?: (\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    return MARK.sub(lambda mark: f"```text\n{help_text(mark[1])}```", markdown)


def help_text(verb: str | None) -> str:
    """The help of `verb`, or of `pa-fast` itself, as plain text."""
    command = [sys.executable, "-m", "pa_fast", *([verb] if verb else []), "--help"]
    plain = {"TYPER_USE_RICH": "0", "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run(
        command, env={**os.environ, **plain}, capture_output=True, text=True, check=True
    )
    return done.stdout

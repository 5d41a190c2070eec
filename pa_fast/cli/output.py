"""Output of the commands: data on stdout; messages and bars on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pa_fast.errors import OutputError
from pa_fast.terminal import console, say, tell

if TYPE_CHECKING:
    from rich.table import Table

    from pa_fast.sweep.results import SweepResult


def open_standard_streams() -> None:
    """Open as /dev/null those of stdin, stdout and stderr that the caller closed, so that no other
    file gets their descriptors.

    Raises:
        OutputError: stdout was closed, so that no result can be printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise OutputError(
            "standard output is closed",
            "open it; what is not wanted goes to /dev/null: … > /dev/null",
        )


def debugging() -> bool:
    """Return whether --debug was given, before the command or behind it."""
    return "--debug" in sys.argv[1:]


def drop_output() -> None:
    """Redirect stdout to /dev/null, so that data left in its buffer do not fail again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def where(result: SweepResult) -> str:
    """Return the run folder of a sweep, relative to the current directory if it is inside it."""
    here = pathlib.Path.cwd()
    inside = result.out.is_relative_to(here)
    return str(result.out.relative_to(here) if inside else result.out)


def say_where(result: SweepResult, has_page: bool = True) -> None:
    """Print the run folder of a sweep, and what was drawn in it. Without `has_page` its report.html
    is of an earlier sweep, and not named."""
    labels = {"trajectory.png": " and figure", "report.html": ", page report.html"}
    named = [name for name in labels if has_page or name != "report.html"]
    figure = "".join(labels[name] for name in named if (result.out / name).exists())
    say(f"results{figure}: {where(result)}")


def show(part: Table | str) -> None:
    """Print a table or a line of text on stdout. A table that is wider than the terminal is printed
    as blocks of columns, one below the other."""
    width = _columns()
    if isinstance(part, str):
        tell(_wrapped(part, width))
        return
    from pa_fast.cli.tables import blocks

    out = console(width=10_000)  # what is wider than the terminal all the same stays whole
    if part.title:
        out.print(_wrapped(str(part.title), width), style="table.title")
    for number, block in enumerate(blocks(part, width)):
        if number and not part.show_edge:
            out.print()
        block.title = None
        out.print(block)


def _wrapped(line: str, width: int) -> str:
    """Return `line` broken between words into lines of at most `width`, all but the first
    indented."""
    return textwrap.fill(
        line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _columns() -> int:
    """Return the width of lines on stdout: that of the variable COLUMNS, else of the terminal."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    # A pipe has no width: wrapping there would break tables for the programs that read them.
    return console().width if sys.stdout.isatty() else 10_000


def show_json(report: Any) -> None:
    """Print a report, a dataclass, on stdout as one JSON document."""
    tell_json(json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False, default=str))


def tell_json(document: str) -> None:
    """Print a JSON document on stdout, with JSON's own escapes for characters that cannot be
    printed."""
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in document))


@contextmanager
def byte_bar(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of bytes and rate on stderr, if stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

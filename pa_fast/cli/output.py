"""Output of the verbs: data on stdout; messages and bars on stderr."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pa_fast.errors import OutputError
from pa_fast.terminal import console, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

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


def drop_output() -> None:
    """Point stdout at /dev/null, so that data left in its buffer do not fail again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_where(result: SweepResult) -> None:
    """Print the folder of a sweep, relative to this one if it lies in it."""
    figure = " and figure" if (result.out / "trajectory.png").exists() else ""
    here = pathlib.Path.cwd()
    say(
        f"results{figure}:"
        f" {result.out.relative_to(here) if result.out.is_relative_to(here) else result.out}"
    )


def show(table: Table) -> None:
    """Print a table on stdout; on a terminal too narrow for its figures as blocks of columns, one
    below the other."""
    # A pipe has no width: wrapping there would break tables for the programs that read them.
    out = console(width=None if sys.stdout.isatty() else 10_000)
    for block in blocks(table, out):
        out.print(block)


def blocks(table: Table, out: Console) -> list[Table]:
    """Return `table` as tables that fit `out`, each with its first column; itself if it fits."""
    groups: list[list[Column]] = [[]]
    for column in table.columns[1:]:
        tried = _of_columns(table, [table.columns[0], *groups[-1], column])
        if groups[-1] and _least_width(tried) > out.width:
            groups.append([])
        groups[-1].append(column)
    if len(groups) == 1:
        return [table]
    tables = [_of_columns(table, [table.columns[0], *group]) for group in groups]
    for block in tables[:-1]:
        block.caption = None
    return tables


def _least_width(table: Table) -> int:
    """Return the columns of the terminal that `table` needs if its headers are wrapped."""
    return sum((column.min_width or 1) + 3 for column in table.columns) + 1


def _of_columns(table: Table, columns: list[Column]) -> Table:
    part = copy.copy(table)
    part.columns = [dataclasses.replace(column) for column in columns]
    for index, column in enumerate(part.columns):
        column._index, column._cells = index, columns[index]._cells
    return part


def show_json(report: Any) -> None:
    """Print a report on stdout as one document."""
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

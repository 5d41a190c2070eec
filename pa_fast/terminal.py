"""Output to a terminal: printable text without hidden characters."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pa_fast.foreign import printable

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """Print a message on stderr, printable."""
    print(printable(text), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print a line of data on stdout, printable."""
    print(printable(text))


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a rich console that prints untrusted text as plain text: escaped, and without markup,
    links or emoji."""
    return _console_class()(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class Printable(Console):
        """A console that escapes text and keeps rich's own control segments, because colours are
        not part of the text."""

        def on_broken_pipe(self) -> None:
            """Leave a closed pipe to the caller, where rich would end the process without a
            word."""
            raise

        def render(
            self, renderable: Any, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                if segment.control or segment.text.isprintable():
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    return Printable


@contextlib.contextmanager
def libraries_printable() -> Iterator[None]:
    """Make the log messages and warnings of libraries printable inside the block: they quote names
    and values of checkpoints unescaped."""
    factory, formatted = logging.getLogRecordFactory(), warnings.formatwarning
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *arguments, **options: printable(
        formatted(*arguments, **options)
    )
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatted


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())

"""What a sweep prints while it runs and at its end: text for people, or an object a line."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import typer

from pa_fast.cli.output import debugging, say_where, show, where
from pa_fast.errors import PaFastError, UsageError, parted
from pa_fast.foreign import shortened
from pa_fast.terminal import say, tell

if TYPE_CHECKING:
    from pa_fast.sweep.progress import Progress
    from pa_fast.sweep.results import SweepResult


class SweepOutput(Protocol):
    """The output of one sweep."""

    progress: Progress

    def note(self, text: str) -> None:
        """Show a line that is for this run."""
        ...

    def answer(self, result: SweepResult, title: str = "") -> None:
        """Show the results of a sweep, the answer first; `title` says which of two they are."""
        ...

    def folder(self, result: SweepResult, has_page: bool) -> None:
        """Show where the files of a sweep are; `has_page`: it has written report.html."""
        ...

    def failures(self, result: SweepResult) -> None:
        """Show the points that failed, with --debug and their tracebacks."""
        ...

    def interrupted(self, command: Sequence[str]) -> None:
        """Show the command that goes on."""
        ...

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Return a block whose errors are shown in this form."""
        ...


def sweep_output(log_format: str) -> SweepOutput:
    """Return the output of a log format, text or json.

    Raises:
        UsageError: there is no such format.
    """
    formats: dict[str, type[SweepOutput]] = {"text": TextOutput, "json": JsonOutput}
    if log_format not in formats:
        raise UsageError(
            f"log format `{log_format}` is not available", f"available: {', '.join(formats)}"
        )
    return formats[log_format]()


def say_answer(result: SweepResult, run: str = "") -> None:
    """Print the answer of a sweep in one sentence; nothing where no point is finished."""
    if result.rows:
        show(f"{run}{result.answered()['sentence']}")


class TextOutput(SweepOutput):
    """Answer and table on stdout, the rest on stderr."""

    def __init__(self) -> None:
        from pa_fast.sweep.progress import TerminalProgress

        self.progress = cast("Progress", TerminalProgress())

    def note(self, text: str) -> None:
        say(f"note: {text}")

    def answer(self, result: SweepResult, title: str = "") -> None:
        if title:
            tell(f"\n{title}:")
        else:
            say_answer(result)
        show(result.table())

    def folder(self, result: SweepResult, has_page: bool) -> None:
        say_where(result, has_page)

    def failures(self, result: SweepResult) -> None:
        """Print one line per failed point, with hint and traceback below the first point that has
        them. Without --debug a line says where tracebacks are."""
        from pa_fast.sweep import journal

        known: set[str | None] = {None}
        for failure in result.failures:
            message, hint = parted(failure.error)
            say(
                f"failed: {failure.evaluator} at λ = {failure.lam.key}:"
                f" {shortened(' '.join(message.split()))}"
            )
            if hint not in known:
                say(f"  hint: {shortened(hint or '')}")
                known.add(hint)
            if debugging() and failure.traceback not in known:
                say((failure.traceback or "").rstrip())
                known.add(failure.traceback)
        if not debugging() and any(failure.traceback for failure in result.failures):
            say(
                f"their tracebacks are in {where(result)}/{journal.NAME}, key `traceback`; --debug"
                " prints them"
            )

    def interrupted(self, command: Sequence[str]) -> None:
        say(f"\ninterrupted; finished points are kept. Go on with:\n  {shlex.join(command)}")

    def errors(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class JsonOutput(SweepOutput):
    """Every line is one JSON object: the answers on stdout, all other events on stderr."""

    def __init__(self) -> None:
        from pa_fast.sweep.live_view import JsonProgress

        self._log = JsonProgress()
        self.progress = cast("Progress", self._log)

    def note(self, text: str) -> None:
        self._log.noted(text)

    def answer(self, result: SweepResult, title: str = "") -> None:
        self._log.write("answer", True, title=title or None, **result.answered())

    def folder(self, result: SweepResult, has_page: bool) -> None:
        self._log.write("results", folder=where(result), page=has_page)

    def failures(self, result: SweepResult) -> None:
        # each was an event when it was recorded, without its traceback
        for failure in result.failures if debugging() else ():
            if failure.traceback:
                self._log.write(
                    "traceback",
                    **{"lambda": failure.lam.key, "evaluator": failure.evaluator},
                    traceback=failure.traceback,
                )

    def interrupted(self, command: Sequence[str]) -> None:
        self._log.write("interrupted", command=shlex.join(command))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except PaFastError as error:
            self._log.write("error", message=error.message, hint=error.hint)
            raise typer.Exit(error.exit_code) from error

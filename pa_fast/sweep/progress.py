"""How far a sweep is: what the driver tells, and a terminal that shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, cast

from pa_fast import terminal
from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.foreign import one_line, shortened
from pa_fast.sweep.entry import Entry
from pa_fast.sweep.results import score_text
from pa_fast.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import Task
    from rich.text import Text


class Progress(Protocol):
    """What the driver tells, in this order: `begin`, then per λ `switched`, per evaluator
    `evaluating` and `recorded` (the point is durable by then), and `end` whatever happened. At any
    time, what is worth knowing of the model, an evaluator or the figure: `noted`.
    """

    @property
    def within(self) -> Callable[[int, int], object] | None:
        """Called with (done, total) of the running point's requests; None hears of none."""
        ...

    def noted(self, note: str) -> None: ...

    def begin(self, points: int, finished: int) -> None:
        """The sweep has `points` points, of which `finished` were finished by earlier runs."""
        ...

    def switched(self, lam: Lambda, seconds: float) -> None: ...

    def evaluating(self, lam: Lambda, evaluator: str) -> None: ...

    def recorded(self, entry: Entry) -> None: ...

    def end(self) -> None: ...


class Silent:
    """Shows nothing."""

    within: Callable[[int, int], object] | None = None

    def noted(self, note: str) -> None: ...

    def begin(self, points: int, finished: int) -> None: ...

    def switched(self, lam: Lambda, seconds: float) -> None: ...

    def evaluating(self, lam: Lambda, evaluator: str) -> None: ...

    def recorded(self, entry: Entry) -> None: ...

    def end(self) -> None: ...


_EVENTS = ("noted", "begin", "switched", "evaluating", "recorded", "end")


class _Partial(Silent):
    """An object that is told of those events for which it has a method."""

    def __init__(self, told: object, events: Iterable[str]):
        for event in events:
            setattr(self, event, getattr(told, event))


def listening(progress: object | None) -> Progress:
    """`progress` with every method of `Progress`: those that it lacks do nothing; None is `Silent`.

    Raises:
        UsageError: it has none of them.
    """
    if progress is None:
        return Silent()
    heard = [event for event in _EVENTS if callable(getattr(progress, event, None))]
    if not heard:
        raise UsageError(
            f"a {type(progress).__name__} hears nothing of a sweep",
            f"give it one or more of: {', '.join(_EVENTS)}",
        )
    if callable(getattr(progress, "within", None)):
        heard.append("within")
    return cast(Progress, progress) if len(heard) > len(_EVENTS) else _Partial(progress, heard)


class TerminalProgress:
    """One line per recorded point on stderr, and under them a bar where stderr is a terminal."""

    def __init__(self, console: Console | None = None):
        self._console = console if console is not None else terminal.console(stderr=True)
        self._bar: Bar | None = None
        self._points = self._done = self._done_before = 0
        self._started_s = 0.0
        self._share = 0.0  # of the running point that is done
        self._label = ""
        self._left_s: float | None = None
        self._estimated_s = 0.0

    def noted(self, note: str) -> None:
        self._console.print(f"note: {shortened(note)}", markup=False, soft_wrap=True)

    def begin(self, points: int, finished: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar
        from rich.text import Text

        class Left(ProgressColumn):
            """The time left, drawn again with every frame: it counts down between two things that
            are told."""

            def render(_, task: Task) -> Text:
                return Text(self._countdown())

        self._points, self._done, self._done_before = points, finished, finished
        self._started_s = time.monotonic()
        if finished:
            self._console.print(f"{finished} of {points} points are finished already", markup=False)
        if self._console.is_terminal and finished < points:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                Left(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.add_task("loading", total=points, completed=finished)
            self._bar.start()

    def switched(self, lam: Lambda, seconds: float) -> None:
        self._describe(f"λ {lam.key} · switched in {format_seconds(seconds)}")

    def evaluating(self, lam: Lambda, evaluator: str) -> None:
        self._label = f"λ {lam.key} · {evaluator}"
        self._describe(self._label)

    def within(self, done: int, total: int) -> None:
        """Of the running point's requests so many are done."""
        self._share = done / max(total, 1)
        self._left()
        self._describe(f"{self._label} · {done}/{total}")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done + self._share)

    def recorded(self, entry: Entry) -> None:
        self._done += 1
        self._share = 0.0
        left = self._left()
        end = f"  {self._done}/{self._points}" + (f", {left} left" if left else "")
        self._console.print(
            _line(entry) + end, style="red" if entry.error else None, markup=False, soft_wrap=True
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text)

    def _left(self) -> str:
        """The time that the missing points take if they take as long as those of this run; empty
        where none is known."""
        new, missing = (
            self._done + self._share - self._done_before,
            self._points - self._done - self._share,
        )
        self._estimated_s = time.monotonic()
        self._left_s = (
            (self._estimated_s - self._started_s) / new * missing
            if new > 0 and missing > 0
            else None
        )
        return "" if self._left_s is None else format_seconds(self._left_s)

    def _countdown(self) -> str:
        """The time left now: what was left when something was last told, less what has passed
        since."""
        if self._left_s is None:
            return ""
        return (
            f"· {format_seconds(max(self._left_s - (time.monotonic() - self._estimated_s), 0.0))}"
            " left"
        )


def _line(entry: Entry) -> str:
    if entry.error is not None:
        said = next(iter(entry.error.strip().splitlines()), "without a message")
        return f"λ {entry.lam:<5} {entry.evaluator}  failed: {one_line(said, 500)}"
    assert entry.score is not None and entry.switch_s is not None and entry.eval_s is not None
    times = f"switch {format_seconds(entry.switch_s)}, evaluation {format_seconds(entry.eval_s)}"
    return f"λ {entry.lam:<5} {entry.evaluator}  {score_text(entry.score)} {entry.unit}  {times}"

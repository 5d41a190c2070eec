"""Progress of a sweep: the events of the driver, and their display in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from pa_fast import terminal
from pa_fast.base import Lambda
from pa_fast.errors import UsageError
from pa_fast.foreign import one_line, shortened
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.live_view import Curves, steps_for
from pa_fast.sweep.results import score_text
from pa_fast.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar
    from rich.progress import Task
    from rich.text import Text

    from pa_fast.sweep.results import SweepResult


class Progress(Protocol):
    """Events of the driver, in this order: `begin`, then per λ `switched`, per evaluator
    `evaluating` and `recorded` (the point is on disk by then), and always `end`. Between two λ an
    adaptive schedule may have `extended`. `resumed` follows `begin` where points are finished.
    `noted`, a note on the model, an evaluator or the figure, may come at any time.
    """

    @property
    def within(self) -> Callable[[int, int], object] | None:
        """Called with (done, total) of the running point's requests; None: not called."""
        ...

    def noted(self, note: str) -> None: ...

    def begin(self, points: int, finished: int) -> None:
        """Begin a sweep of `points` points, of which earlier runs finished `finished`."""
        ...

    def resumed(
        self, entries: Sequence[JournalEntry], higher_is_better: Mapping[str, bool]
    ) -> None:
        """The finished points of earlier runs, and the direction of each evaluator's score."""
        ...

    def extended(self, points: int, why: str) -> None:
        """Points were added, for the reason `why`: there are `points` now, finished ones
        included."""
        ...

    def switched(self, lam: Lambda, seconds: float) -> None: ...

    def evaluating(self, lam: Lambda, evaluator: str) -> None: ...

    def recorded(self, entry: JournalEntry) -> None: ...

    def end(self) -> None: ...


class Silent:
    """Shows nothing."""

    within: Callable[[int, int], object] | None = None

    def noted(self, note: str) -> None: ...

    def begin(self, points: int, finished: int) -> None: ...

    def resumed(
        self, entries: Sequence[JournalEntry], higher_is_better: Mapping[str, bool]
    ) -> None: ...

    def extended(self, points: int, why: str) -> None: ...

    def switched(self, lam: Lambda, seconds: float) -> None: ...

    def evaluating(self, lam: Lambda, evaluator: str) -> None: ...

    def recorded(self, entry: JournalEntry) -> None: ...

    def end(self) -> None: ...


_EVENTS = ("noted", "begin", "resumed", "extended", "switched", "evaluating", "recorded", "end")


class _Partial(Silent):
    """Events passed on to an object for which it has a method."""

    def __init__(self, receiver: object, events: Iterable[str]):
        for event in events:
            setattr(self, event, getattr(receiver, event))


def listening(progress: object | None) -> Progress:
    """Return `progress` with every method of `Progress`: those that it lacks do nothing; `Silent`
    for None.

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


_CALLS = ("on_point", "on_score", "on_end")


class Callbacks:
    """Events passed on to `progress`, and to each of `callbacks` those for which it has a method.

    `on_point(lam, lm)`: the weights hold λ and are verified, before its evaluators; again where an
    evaluator wrote to them. `on_score(entry)`: a point is recorded. `on_end(result)`: the sweep has
    ended without an error, after its files are written. What they raise ends the sweep; points that
    are recorded stay.

    Raises:
        UsageError: a callback has none of these methods.
    """

    def __init__(self, progress: Progress, callbacks: Iterable[object], lm: object):
        self._progress, self._lm = progress, lm
        if not isinstance(callbacks, Iterable):
            raise UsageError(
                f"callbacks is a {type(callbacks).__name__}", "give a list: callbacks=[…]"
            )
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            if isinstance(callback, type):
                raise UsageError(
                    f"the callback {callback.__name__} is a class",
                    f"make one: {callback.__name__}()",
                )
            if not any(callable(getattr(callback, name, None)) for name in _CALLS):
                raise UsageError(
                    f"a {type(callback).__name__} hears nothing of a sweep",
                    f"give it one or more of: {', '.join(_CALLS)}",
                )

    def __getattr__(self, event: str) -> Any:
        return getattr(self._progress, event)

    def _call(self, name: str, *arguments: object) -> None:
        for callback in self._callbacks:
            if (method := getattr(callback, name, None)) is not None:
                method(*arguments)

    def switched(self, lam: Lambda, seconds: float) -> None:
        self._progress.switched(lam, seconds)
        self._call("on_point", lam, self._lm)

    def recorded(self, entry: JournalEntry) -> None:
        self._progress.recorded(entry)
        self._call("on_score", entry)

    def finished(self, result: SweepResult) -> None:
        self._call("on_end", result)


class TerminalProgress:
    """One line per recorded point on stderr; where stderr is a terminal, under them the curve so
    far of each evaluator, and a bar."""

    def __init__(self, console: Console | None = None):
        self._console = console if console is not None else terminal.console(stderr=True)
        self._bar: Bar | None = None
        self._curves = Curves({}, steps_for(self._console.encoding))
        self._points = self._done = self._done_before = 0
        self._started_s = 0.0
        self._share = 0.0  # of the running point that is done
        self._label = ""
        self._remaining_s: float | None = None
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

        class TimeLeft(ProgressColumn):
            """The time left, drawn with every frame, so that it counts down between events."""

            def render(_, task: Task) -> Text:
                return Text(self._countdown())

        class BarUnderCurves(Bar):
            """The bar, under the curves."""

            def get_renderables(bar) -> Iterable[RenderableType]:
                yield from map(Text, self._curves.lines(self._console.width))
                yield from super().get_renderables()

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
                TimeLeft(),
            )
            self._bar = BarUnderCurves(*columns, console=self._console, transient=True)
            self._bar.add_task("loading", total=points, completed=finished)
            self._bar.start()

    def resumed(
        self, entries: Sequence[JournalEntry], higher_is_better: Mapping[str, bool]
    ) -> None:
        self._curves = Curves(higher_is_better, steps_for(self._console.encoding))
        for entry in entries:
            self._curves.add(entry)

    def extended(self, points: int, why: str) -> None:
        self._points = points
        self._console.print(why, markup=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=points)

    def switched(self, lam: Lambda, seconds: float) -> None:
        self._describe(f"λ {lam.key} · switched in {format_seconds(seconds)}")

    def evaluating(self, lam: Lambda, evaluator: str) -> None:
        self._label = f"λ {lam.key} · {evaluator}"
        self._describe(self._label)

    def within(self, done: int, total: int) -> None:
        """Show that `done` of the running point's requests are done."""
        self._share = done / max(total, 1)
        self._time_left()
        self._describe(f"{self._label} · {done}/{total}")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done + self._share)

    def recorded(self, entry: JournalEntry) -> None:
        self._done += 1
        self._share = 0.0
        self._curves.add(entry)
        remaining = self._time_left()
        end = f"  {self._done}/{self._points}" + (f", {remaining} left" if remaining else "")
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

    def _time_left(self) -> str:
        """Return the time of the missing points if they take as long as those of this run; empty
        where it is not known."""
        new, missing = (
            self._done + self._share - self._done_before,
            self._points - self._done - self._share,
        )
        self._estimated_s = time.monotonic()
        self._remaining_s = (
            (self._estimated_s - self._started_s) / new * missing
            if new > 0 and missing > 0
            else None
        )
        return "" if self._remaining_s is None else format_seconds(self._remaining_s)

    def _countdown(self) -> str:
        """Return the time left now: that of the last event, less the time since."""
        if self._remaining_s is None:
            return ""
        since_s = time.monotonic() - self._estimated_s
        return f"· {format_seconds(max(self._remaining_s - since_s, 0.0))} left"


def _line(entry: JournalEntry) -> str:
    if entry.error is not None:
        message = next(iter(entry.error.strip().splitlines()), "without a message")
        return f"λ {entry.lam:<5} {entry.evaluator}  failed: {one_line(message, 500)}"
    assert entry.score is not None and entry.switch_s is not None and entry.eval_s is not None
    times = f"switch {format_seconds(entry.switch_s)}, evaluation {format_seconds(entry.eval_s)}"
    return f"λ {entry.lam:<5} {entry.evaluator}  {score_text(entry.score)} {entry.unit}  {times}"

"""What people and programs see of a sweep while it runs: the curve so far, and events as JSON."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from pa_fast.base import Lambda
from pa_fast.foreign import one_line
from pa_fast.sweep.entry import JournalEntry
from pa_fast.sweep.results import score_text

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_NAME = 28
_WIDEST = 60


class Curves:
    """The scores so far, as one line of text for each evaluator: lowest to highest in eight steps,
    λ from left to right.

    Args:
        higher_is_better: evaluator → its direction; of others no best λ is named.
        steps: eight characters.
    """

    def __init__(self, higher_is_better: Mapping[str, bool], steps: str = BLOCKS):
        self._higher = dict(higher_is_better)
        self._steps = steps
        self._scores: dict[str, dict[Lambda, float]] = {}

    def add(self, entry: JournalEntry) -> None:
        if entry.score is not None and math.isfinite(entry.score):
            self._scores.setdefault(entry.evaluator, {})[Lambda(entry.lam)] = entry.score

    def lines(self, width: int) -> Iterator[str]:
        """Yield a line of at most `width` characters for each evaluator with two scores or more."""
        for name, scores in self._scores.items():
            if len(scores) < 2:
                continue
            lams = sorted(scores, key=lambda lam: lam.exact)
            best = self._best(name, scores)
            shown = one_line(name, _NAME).ljust(min(_NAME, max(map(len, self._scores))))
            columns = min(_WIDEST, width - len(shown) - len(best) - 3)
            if columns >= 2:
                curve = self._curve([scores[lam] for lam in lams], columns)
                yield f"{shown} {curve} {best}"

    def _best(self, name: str, scores: Mapping[Lambda, float]) -> str:
        if name not in self._higher:
            return ""
        sign = 1 if self._higher[name] else -1
        lam = max(scores, key=lambda lam: (sign * scores[lam], -lam.exact))
        return f"best {score_text(scores[lam])} at λ = {lam.key}"

    def _curve(self, scores: Sequence[float], columns: int) -> str:
        count = min(len(scores), columns)
        edges = [k * len(scores) // count for k in range(count + 1)]
        means = [sum(scores[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, span = min(means), max(means) - min(means)
        if not span or not math.isfinite(span):
            return self._steps[0] * count
        return "".join(self._steps[round(7 * (mean - low) / span)] for mean in means)


def steps_for(encoding: str | None) -> str:
    """Return the characters of curves that text of an encoding can hold."""
    try:
        BLOCKS.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return PLAIN
    return BLOCKS


class JsonProgress:
    """One JSON object a line and event on stderr, for the logs of clusters: `event`, `time` (Unix,
    seconds), and what `Progress` says of it."""

    within: Callable[[int, int], object] | None = None

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream
        self._points = self._done = 0

    def write(self, event: str, is_data: bool = False, /, **fields: Any) -> None:
        """Print one event with those of its fields that are not None, on stdout if `is_data`."""
        stream = (sys.stdout if is_data else sys.stderr) if self._stream is None else self._stream
        known = {name: value for name, value in fields.items() if value is not None}
        print(json.dumps({"event": event, "time": round(time.time(), 3)} | known), file=stream)
        stream.flush()

    def noted(self, note: str) -> None:
        self.write("noted", note=note)

    def begin(self, points: int, finished: int) -> None:
        self._points, self._done = points, finished
        self.write("begin", points=points, finished=finished)

    def resumed(
        self, entries: Sequence[JournalEntry], higher_is_better: Mapping[str, bool]
    ) -> None: ...

    def extended(self, points: int, why: str) -> None:
        self._points = points
        self.write("extended", points=points, why=why)

    def switched(self, lam: Lambda, seconds: float) -> None:
        self.write("switched", **{"lambda": lam.key, "switch_s": seconds})

    def evaluating(self, lam: Lambda, evaluator: str) -> None:
        self.write("evaluating", **{"lambda": lam.key, "evaluator": evaluator})

    def recorded(self, entry: JournalEntry) -> None:
        self._done += 1
        line = json.loads(entry.line())
        line.pop("traceback", None)
        self.write("recorded", done=self._done, points=self._points, **line)

    def end(self) -> None:
        self.write("end", done=self._done, points=self._points)

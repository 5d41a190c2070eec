"""The panel of one score against another, in λ order, turned so that better is up and right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_fast.sweep.trajectory import FAINT, INK, Line, decades, note, scale_log, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDS = {"0": "base", "1": "instruct"}
_FONT_POINTS = 9.0
_CLEARANCE_POINTS = 9.0
MOST_NAMED = 60  # more names than fit the panel


def common(right: Line, up: Line) -> list[tuple[float, float, float, str]]:
    """Return (score, score, λ, key of λ) of the points where both lines have a score."""
    every = zip(right.scores, up.scores, right.lams, right.keys)
    return [(x, y, lam, key) for x, y, lam, key in every if not math.isnan(x) and not math.isnan(y)]


def draw(axes: Axes, right: Line, up: Line, width: float, height: float) -> None:
    """Draw `right` across and `up` upwards, a point per λ in the colour of its λ; `width` and
    `height` are in characters."""
    from matplotlib import colormaps

    points = common(right, up)
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    axes.plot(xs, ys, color=FAINT, lw=1.4, zorder=2)
    low, high = right.lams[0], right.lams[-1]
    colours = colormaps["viridis"](
        [0.88 * (point[2] - low) / ((high - low) or 1.0) for point in points]
    )
    axes.scatter(xs, ys, c=colours, s=46, zorder=3, edgecolors="white", linewidths=0.8)
    for axis, scores in ((axes.xaxis, xs), (axes.yaxis, ys)):
        if decades(scores):
            scale_log(axes, axis)
    axes.margins(0.16)
    axes.set_xlabel(wrapped(0.75 * width, right.short, f"({right.unit})"))
    axes.set_ylabel(wrapped(0.75 * height, up.short, f"({up.unit})"))
    axes.set_title("trade-off", pad=10)
    axes.set_title("better ↗", loc="right", color="#7b8490", fontsize=10, pad=10)
    if not right.higher_is_better:
        axes.invert_xaxis()
    if not up.higher_is_better:
        axes.invert_yaxis()


@dataclass(frozen=True)
class _Box:
    """A rectangle on the page, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def within(self, other: _Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )


def name_points(axes: Axes, right: Line, up: Line) -> None:
    """Write λ beside its point: first base, instruct and the best points, then others where they
    fit. The layout must be final.

    Cost: linear in points: of many at most `MOST_NAMED`, evenly spaced, are tried beside the first
        ones.
    """
    points = common(right, up)
    per_point = 72 / axes.figure.dpi
    transformed = axes.transData.transform([point[:2] for point in points])
    spots = [(float(x) * per_point, float(y) * per_point) for x, y in transformed]
    window = axes.get_window_extent()
    page = _Box(*(edge * per_point for edge in (window.x0, window.y0, window.x1, window.y1)))
    taken = [_Box(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in spots]
    middle = tuple(sum(axis) / len(spots) for axis in zip(*spots))
    first = {*_ENDS, right.keys[right.best], up.keys[up.best]}
    step = -(-len(points) // MOST_NAMED)
    named = [i for i in range(len(points)) if i % step == 0 or points[i][3] in first]
    for i in sorted(named, key=lambda i: (points[i][3] not in first, i)):
        key = points[i][3]
        text = f"{key} {_ENDS[key]}" if key in _ENDS else key
        outwards = math.atan2(spots[i][1] - middle[1], spots[i][0] - middle[0])
        turns = 8 if key in first else 4
        for offset, box in _positions(spots[i], text, outwards, turns):
            if box.within(page) and not any(box.meets(other) for other in taken):
                taken.append(box)
                note(
                    axes,
                    text,
                    points[i][:2],
                    offset,
                    INK,
                    ha="center",
                    va="center",
                    fontsize=_FONT_POINTS,
                )
                break


def _positions(
    spot: Sequence[float], text: str, outwards: float, turns: int
) -> Iterator[tuple[tuple[float, float], _Box]]:
    """Yield offsets of the middle of `text` from its point, and its box there: outwards first, then
    up to `turns` eighths of a half turn to either side."""
    half_width, half_height = 0.3 * _FONT_POINTS * len(text), 0.55 * _FONT_POINTS
    for turn in sorted(range(-turns, turns + 1), key=abs):
        cos, sin = math.cos(outwards + turn * math.pi / 8), math.sin(outwards + turn * math.pi / 8)
        offset = ((_CLEARANCE_POINTS + half_width) * cos, (_CLEARANCE_POINTS + half_height) * sin)
        x, y = spot[0] + offset[0], spot[1] + offset[1]
        yield offset, _Box(x - half_width, y - half_height, x + half_width, y + half_height)

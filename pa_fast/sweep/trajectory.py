"""The panel along λ: one line per evaluator, its best point, base and instruct."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.sweep.results import score_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#22272e", "#b9c0c9"
_FAILED = "#c0392b"


@dataclass(frozen=True)
class Line:
    """One evaluator's scores along the schedule in ascending order, NaN where a point is missing, and where it failed."""

    name: str
    unit: str
    higher_is_better: bool
    keys: tuple[str, ...]
    lams: tuple[float, ...]
    scores: tuple[float, ...]
    failed: tuple[float, ...]
    colour: str

    @property
    def best(self) -> int:
        sign = 1 if self.higher_is_better else -1
        return max((i for i, s in enumerate(self.scores) if not math.isnan(s)), key=lambda i: sign * self.scores[i])


def draw(axes: Axes, group: Sequence[Line], lowest: bool) -> None:
    """Scores along λ: a ring and a number at each best, names at the ends of the lines, base and instruct on the axis."""
    first = group[0]
    worse = "" if first.higher_is_better else "   lower is better"
    title = f"{first.name}   ({first.unit})" if len(group) == 1 else first.unit
    wide = len(title + worse) > 52  # of the narrowest panel
    axes.set_title(f"{first.name}\n{first.unit}{worse}" if wide and len(group) == 1 else title + worse, pad=10)
    axes.grid(axis="x", visible=False)
    for line in group:
        marker_points = 4.5 if len(line.lams) <= 45 or _isolated(line) else 0
        axes.plot(line.lams, line.scores, color=line.colour, lw=2, marker="o", ms=marker_points, zorder=3)
    _limits(axes, group)
    for lam in (0.0, 1.0):
        if axes.get_xlim()[0] <= lam <= axes.get_xlim()[1]:
            axes.axvline(lam, color=FAINT, lw=1, ls=(0, (2, 3)), zorder=1)
    _mark_failed(axes, sorted({lam for line in group for lam in line.failed}))
    for line in group:
        _mark_best(axes, line)
    if len(group) > 1:
        _name_lines(axes, group)
    _lambda_axis(axes, first.lams, lowest)


def _mark_failed(axes: Axes, failed: Sequence[float]) -> None:
    if failed:
        across = axes.get_xaxis_transform()
        axes.plot(failed, [0.035] * len(failed), "x", color=_FAILED, ms=6, mew=1.6, transform=across, zorder=4)
        low, high = axes.get_xlim()
        after = failed[-1] < low + 0.9 * (high - low)
        at, ha = (failed[-1], "left") if after else (failed[0], "right")
        note(axes, "failed", (at, 0.035), (8 if after else -8, 0), _FAILED, va="center", ha=ha, xycoords=across, fontsize=9)


def _isolated(line: Line) -> bool:
    """Whether a point has a gap on both sides, where a line without markers would not show it."""
    known = [False, *(not math.isnan(score) for score in line.scores), False]
    return any(known[i] and not known[i - 1] and not known[i + 1] for i in range(1, len(known) - 1))


def _limits(axes: Axes, group: Sequence[Line]) -> None:
    lams = group[0].lams
    width = lams[-1] - lams[0] or 1.0
    axes.set_xlim(lams[0] - 0.03 * width, lams[-1] + 0.03 * width)
    scores = [score for line in group for score in line.scores if not math.isnan(score)]
    height = max(scores) - min(scores) or max(abs(scores[0]), 1.0) * 0.1
    over, under = (0.2, 0.1) if group[0].higher_is_better else (0.1, 0.24)
    axes.set_ylim(min(scores) - under * height, max(scores) + over * height)


def _mark_best(axes: Axes, line: Line) -> None:
    lam, score = line.lams[line.best], line.scores[line.best]
    axes.plot([lam], [score], "o", ms=10, mfc="white", mec=line.colour, mew=2.2, zorder=5)
    low, high = axes.get_xlim()
    place = (lam - low) / (high - low)
    ha = "left" if place < 0.15 else "right" if place > 0.85 else "center"
    up = line.higher_is_better
    offset = (0 if ha == "center" else -6 if ha == "left" else 6, 10 if up else -10)
    equal = sum(other == score for other in line.scores)
    text = f"{score_text(score)} at λ = {line.keys[line.best]}" + (f", first of {equal}" if equal > 1 else "")
    note(axes, text, (lam, score), offset, line.colour, ha=ha, va="bottom" if up else "top", fontweight="bold", fontsize=9.5)


def _name_lines(axes: Axes, group: Sequence[Line]) -> None:
    """Names at the right edge, each at the height where its line ends, moved apart where they would touch."""
    low, high = axes.get_ylim()
    ends = sorted(
        ((next(s for s in reversed(line.scores) if not math.isnan(s)) - low) / (high - low), line.name, line) for line in group
    )
    heights = _apart([end[0] for end in ends], 0.075)
    for height, (_, _, line) in zip(heights, ends):
        note(
            axes, line.name, (1, height), (6, 0), line.colour, va="center", ha="left", xycoords="axes fraction", fontweight="bold"
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending `heights` moved up and down until neighbours are `gap` apart."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    shift = (sum(moved) - sum(heights)) / len(moved)
    return [height - shift for height in moved]


def _lambda_axis(axes: Axes, lams: Sequence[float], lowest: bool) -> None:
    low, high = axes.get_xlim()
    ends = [lam for lam in (0.0, 1.0) if low <= lam <= high]
    room = 0.06 * (high - low)
    ticks = (
        lams if len(lams) == 1 else [float(t) for t in axes.xaxis.get_major_locator().tick_values(low, high) if low <= t <= high]
    )
    ticks = sorted([t for t in ticks if all(abs(t - end) > room for end in ends)] + ends)
    names = {0.0: "\nbase", 1.0: "\ninstruct"}
    axes.set_xticks(ticks, [f"{t:.4g}{names.get(t, '')}" if lowest else "" for t in ticks])
    axes.tick_params(length=3)
    if lowest:
        axes.set_xlabel("λ", labelpad=-8 if ends else 4)


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **options: Any) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    options.setdefault("xycoords", "data")
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        path_effects=halo,
        annotation_clip=False,
        zorder=6,
        **options,
    )

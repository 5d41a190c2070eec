"""The panel along λ: one line per evaluator, its best point, base and instruct."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pa_fast.sweep.results import score_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, FAINT = "#22272e", "#b9c0c9"
_CUT = "#7b8490"
_BESIDE = 22  # characters of a line of a name beside the panel
_WHOLE = 0.3  # of 0 to 1 that scores must span for the axis to show all of it
_FAILED = "#c0392b"


@dataclass(frozen=True)
class Line:
    """One evaluator's scores along the schedule in ascending order, NaN where a point is missing,
    and the λ at which it failed."""

    name: str
    unit: str
    higher_is_better: bool
    keys: tuple[str, ...]
    lams: tuple[float, ...]
    scores: tuple[float, ...]
    failed: tuple[float, ...]
    colour: str

    @property
    def short(self) -> str:
        """The name, without its middle where it is long: names of one kind often differ at the
        end."""
        return self.name if len(self.name) <= 36 else f"{self.name[:17]}…{self.name[-18:]}"

    @property
    def best(self) -> int:
        sign = 1 if self.higher_is_better else -1
        return max(
            (i for i, s in enumerate(self.scores) if not math.isnan(s)),
            key=lambda i: sign * self.scores[i],
        )


def wrapped(width: float, *parts: str) -> str:
    """Return `parts` in one line of at most `width` characters, else in a line or more each."""
    line = "   ".join(part for part in parts if part)
    if len(line) <= width:
        return line
    return "\n".join(_broken(part, max(int(width), 12)) for part in parts if part)


def _broken(text: str, width: int) -> str:
    """Return `text` in lines of at most `width` characters, broken after a comma or a space where
    it has some."""
    lines = [""]
    for word in re.split(r"(?<=[,\s])(?=\S)", text):
        for piece in [word[start : start + width] for start in range(0, len(word), width)]:
            if len(lines[-1] + piece.rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def decades(scores: Iterable[float]) -> bool:
    """Return whether `scores` span two decades or more, for which a linear axis is too coarse."""
    known = [score for score in scores if not math.isnan(score)]
    return min(known) > 0 and max(known) >= 100 * min(known)


def scale_log(axes: Axes, axis: Axis) -> None:
    """Make `axis` logarithmic, with plain numbers at the decades."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw(axes: Axes, group: Sequence[Line], lowest: bool, width: float) -> None:
    """Draw scores along λ: a ring and a number at each best, names at the ends of the lines, base
    and instruct on the axis.

    Args:
        width: characters of a title that fit the panel.
    """
    first = group[0]
    worse = "" if first.higher_is_better else "   lower is better"
    title = (first.name, f"({first.unit}){worse}") if len(group) == 1 else (f"{first.unit}{worse}",)
    axes.set_title(wrapped(width, *title), pad=10)
    axes.grid(axis="x", visible=False)
    for line in group:
        marker_points = 4.5 if len(line.lams) <= 45 or _isolated(line) else 0
        axes.plot(
            line.lams, line.scores, color=line.colour, lw=2, marker="o", ms=marker_points, zorder=3
        )
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
        axes.plot(
            failed,
            [0.035] * len(failed),
            "x",
            color=_FAILED,
            ms=6,
            mew=1.6,
            transform=across,
            zorder=4,
        )
        low, high = axes.get_xlim()
        after = failed[-1] < low + 0.9 * (high - low)
        xy, ha = (failed[-1], "left") if after else (failed[0], "right")
        note(
            axes,
            "failed",
            (xy, 0.035),
            (8 if after else -8, 0),
            _FAILED,
            va="center",
            ha=ha,
            xycoords=across,
            fontsize=9,
        )


def _isolated(line: Line) -> bool:
    """Return whether a point has a gap on both sides, where a line without markers would not show
    it."""
    known = [False, *(not math.isnan(score) for score in line.scores), False]
    return any(known[i] and not known[i - 1] and not known[i + 1] for i in range(1, len(known) - 1))


def _limits(axes: Axes, group: Sequence[Line]) -> None:
    lams = group[0].lams
    width = lams[-1] - lams[0] or 1.0
    axes.set_xlim(lams[0] - 0.03 * width, lams[-1] + 0.03 * width)
    scores = [score for line in group for score in line.scores if not math.isnan(score)]
    least, most = min(scores), max(scores)
    above, below = (0.2, 0.1) if group[0].higher_is_better else (0.1, 0.24)
    if decades(scores):
        scale_log(axes, axes.yaxis)
        low, high = math.log10(least), math.log10(most)
        # within what a double holds
        axes.set_ylim(
            10 ** max(low - below * (high - low), -300.0),
            10 ** min(high + above * (high - low), 305.0),
        )
        return
    height = most - least or max(abs(scores[0]), 1.0) * 0.1
    if group[0].higher_is_better and least >= 0 and most <= 1 and height >= _WHOLE:
        axes.set_ylim(-0.03, max(1.03, most + 0.15))
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        return
    low, high = least - below * height, most + above * height
    if least >= 0 > low:
        low = 0.0  # no tick for what no score can be
    axes.set_ylim(low, high)
    if low > 0 or high < 0:
        _mark_cut(axes)


def _mark_cut(axes: Axes) -> None:
    """Draw two strokes across the score axis at its lower end: it does not begin at 0."""
    across: dict[str, Any] = {
        "transform": axes.transAxes,
        "clip_on": False,
        "color": FAINT,
        "lw": 1.1,
        "zorder": 7,
    }
    for height in (0.022, 0.042):
        axes.plot([-0.012, 0.012], [height - 0.012, height + 0.012], **across)
    note(
        axes,
        "axis cut",
        (0, 0.03),
        (8, 0),
        _CUT,
        va="center",
        ha="left",
        xycoords="axes fraction",
        fontsize=8,
    )


def _mark_best(axes: Axes, line: Line) -> None:
    lam, score = line.lams[line.best], line.scores[line.best]
    axes.plot([lam], [score], "o", ms=10, mfc="white", mec=line.colour, mew=2.2, zorder=5)
    low, high = axes.get_xlim()
    share = (lam - low) / (high - low)
    ha = "left" if share < 0.15 else "right" if share > 0.85 else "center"
    up = line.higher_is_better
    offset = (0 if ha == "center" else -6 if ha == "left" else 6, 10 if up else -10)
    equal = sum(other == score for other in line.scores)
    text = f"{score_text(score)} at λ = {line.keys[line.best]}" + (
        f", first of {equal}" if equal > 1 else ""
    )
    note(
        axes,
        text,
        (lam, score),
        offset,
        line.colour,
        ha=ha,
        va="bottom" if up else "top",
        fontweight="bold",
        fontsize=9.5,
    )


def _name_lines(axes: Axes, group: Sequence[Line]) -> None:
    """Write names at the right edge, each at the height where its line ends, moved apart where they
    would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    last = [(line, next(s for s in reversed(line.scores) if not math.isnan(s))) for line in group]
    labels = sorted(
        (float(to_axes.transform((line.lams[0], score))[1]), line.name, line)
        for line, score in last
    )
    names = [wrapped(_BESIDE, line.short) for _, _, line in labels]
    heights = _apart(
        [label[0] for label in labels], 0.075 * max(name.count("\n") + 1 for name in names)
    )
    for height, name, (_, _, line) in zip(heights, names, labels):
        note(
            axes,
            name,
            (1, height),
            (6, 0),
            line.colour,
            va="center",
            ha="left",
            xycoords="axes fraction",
            fontweight="bold",
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending `heights` moved up and down until neighbours are `gap` apart."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    shift = (sum(moved) - sum(heights)) / len(moved)
    return [height - shift for height in moved]


def _lambda_axis(axes: Axes, lams: Sequence[float], lowest: bool) -> None:
    low, high = axes.get_xlim()
    sides = [lam for lam in (0.0, 1.0) if low <= lam <= high]
    gap = 0.06 * (high - low)
    ticks = (
        lams
        if len(lams) == 1
        else [
            float(t)
            for t in axes.xaxis.get_major_locator().tick_values(low, high)
            if low <= t <= high
        ]
    )
    ticks = sorted([t for t in ticks if all(abs(t - end) > gap for end in sides)] + sides)
    names = {0.0: "\nbase", 1.0: "\ninstruct"}
    axes.set_xticks(ticks, [f"{t:.4g}{names.get(t, '')}" if lowest else "" for t in ticks])
    axes.tick_params(length=3)
    if lowest:
        axes.set_xlabel("λ", labelpad=-8 if sides else 4)


def note(
    axes: Axes,
    text: str,
    xy: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    **options: Any,
) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    options.setdefault("xycoords", "data")
    axes.annotate(
        text,
        xy,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        path_effects=halo,
        annotation_clip=False,
        zorder=6,
        **options,
    )

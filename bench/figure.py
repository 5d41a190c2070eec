"""The figure of docs/benchmarks.md: seconds that one λ of a sweep takes beside its forward passes,
in place and by way of the disk."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pa_fast.throughput.harness import Table, format_timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACE = "images/per_lambda"
"""Of the figure, below the page's folder, without `.png` and `.svg`."""

OURS = "pa_fast sweep, per λ"
WAYS = {
    OURS: "pa_fast sweep, in place",
    "mergekit merge_state_dicts + copy_, per λ": "mergekit in memory,\ncopied into the model",
    "pa-fast merge + from_pretrained, per λ": "pa-fast merge to disk,\nfrom_pretrained",
    "mergekit + from_pretrained, per λ": "mergekit to disk,\nfrom_pretrained",
}
"""The ways of target P6 that are drawn, and their labels."""


def write(tables: Sequence[Table], path: pathlib.Path) -> bool:
    """Draw the sweep's table to `path` with `.svg` and with `.png` added; False where no table has
    these ways."""
    from pa_fast.sweep.figure import save

    found = [
        table
        for table in tables
        if table.target == "P6" and OURS in {way.name for way in table.ways}
    ]
    if found:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(lambda: draw(found[0]), path)
    return bool(found)


def draw(table: Table) -> Figure:
    """One bar a way from zero, so that lengths compare; a dot for each round."""
    from matplotlib.figure import Figure

    from pa_fast.sweep.figure import COLOURS
    from pa_fast.sweep.trajectory import FAINT

    ways = [way for name in WAYS for way in table.ways if way.name == name]
    ours = table.way(OURS).median_s
    figure = Figure(figsize=(10.0, 0.95 + 0.75 * len(ways)), layout="constrained")
    axes = figure.add_subplot()
    for row, way in enumerate(ways):
        axes.barh(
            row, way.median_s, height=0.58, color=COLOURS[0] if way.name == OURS else "#c3c9d0"
        )
        if len(way.seconds) > 1:
            axes.plot(
                way.seconds, [row] * len(way.seconds), "o", ms=4, mfc="white", mec=FAINT, mew=0.9
            )
        times = "" if way.name == OURS else f",  {way.median_s / ours:.0f} × as long"
        axes.annotate(
            f"{format_timing(way.median_s)}{times}",
            (max(way.seconds), row),
            (9, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            fontweight="bold" if way.name == OURS else "normal",
        )
    axes.set_yticks(range(len(ways)), [WAYS[way.name] for way in ways])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.28 * max(max(way.seconds) for way in ways))
    axes.set_xlabel("seconds per λ, without the evaluators' forward passes; dots are single rounds")
    axes.set_title(f"What one λ costs: {table.case}")
    return figure

"""A figure to choose a store by: loss against bytes, for several stores in one picture."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pa_fast.errors import UsageError
from pa_fast.stores.quality import QualityReport
from pa_fast.sweep import figure
from pa_fast.sweep.trajectory import INK, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StoreCurve:
    """One way to hold a delta, at several settings: reports by label, in the order in which they
    are joined.

    A report without loss cannot be drawn on a log axis and is left out.
    """

    name: str
    points: Sequence[tuple[str, QualityReport]]


def write(curves: Sequence[StoreCurve], dense: QualityReport, path: str | pathlib.Path) -> None:
    """Draw to `path` with `.svg` and with `.png` added; see `draw` and
    `pa_fast.sweep.figure.save`."""
    figure.save(lambda: draw(curves, dense), pathlib.Path(path))


def draw(curves: Sequence[StoreCurve], dense: QualityReport) -> Figure:
    """Draw relative error against bytes, with a line for dense; beside it KL at the last λ, if all
    reports have a text.

    Raises:
        UsageError: no report has a loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    every = [report for curve in curves for _, report in curve.points]
    if not any(report.relative_error > 0 for report in every):
        raise UsageError(
            "nothing to draw: none of these stores loses anything", "add a lossy store"
        )
    text_points = [report.text.points[-1] for report in every if report.text and report.text.points]
    has_text = len(text_points) == len(every) and any(point.kl > 0 for point in text_points)
    drawing = Figure(
        figsize=(figure.WIDTH_INCHES, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    axes = drawing.subplots(1, 1 + has_text, squeeze=False)[0]
    _panel(axes[0], curves, dense, lambda report: report.relative_error)
    axes[0].set_title("relative error   ‖D − D′‖ / ‖D‖", pad=10)
    axes[0].legend(loc="lower left", frameon=False)
    if has_text:
        _panel(
            axes[1], curves, dense, lambda report: report.text.points[-1].kl if report.text else 0.0
        )
        axes[1].set_title(
            f"KL to the exact merge, λ = {text_points[0].lam}   (nats per token)", pad=10
        )
    return drawing


def _panel(
    axes: Axes,
    curves: Sequence[StoreCurve],
    dense: QualityReport,
    height: Callable[[QualityReport], float],
) -> None:
    for curve, colour in zip(curves, figure.COLOURS):
        points = [
            (report.bytes_per_parameter, height(report), label)
            for label, report in curve.points
            if height(report) > 0
        ]
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            "o-",
            color=colour,
            lw=2,
            ms=5,
            zorder=3,
            label=curve.name,
        )
        # a store that costs more loses less: labels fit below a curve, and above the last one
        above = len(curves) > 1 and curve is curves[-1]
        for x, y, label in points:
            offset, ha, va = ((5, 4), "left", "bottom") if above else ((-5, -4), "right", "top")
            note(axes, label, (x, y), offset, colour, ha=ha, va=va, fontsize=8.5)
    _scales(axes)
    dense_bytes = dense.bytes_per_parameter
    axes.axvline(dense_bytes, color=INK, lw=1.4, ls=(0, (4, 3)), zorder=2)
    along = axes.get_xaxis_transform()
    note(
        axes,
        "dense, exact",
        (dense_bytes, 0),
        (4, 4),
        INK,
        ha="left",
        va="bottom",
        fontsize=9,
        rotation=90,
        xycoords=along,
    )
    axes.set_xlabel("bytes of the delta per parameter")


def _scales(axes: Axes) -> None:
    """Set log axes with a number at 1, 2 and 5 of each decade if they fit, or at 1 alone past two
    decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.margins(0.12, 0.08)
    for axis, scale, limits in (
        (axes.xaxis, axes.set_xscale, axes.get_xlim),
        (axes.yaxis, axes.set_yscale, axes.get_ylim),
    ):
        scale("log")
        low, high = limits()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(length=3)

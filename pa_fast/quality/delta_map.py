"""The figure of a pair: the size of its delta, by layer and module."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pa_fast.checkpoint.inspect import PairReport
from pa_fast.checkpoint.measure import joint_norm, short_names
from pa_fast.errors import UsageError
from pa_fast.files import check_outside
from pa_fast.sweep import figure
from pa_fast.sweep.trajectory import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from pa_fast.checkpoint.measure import MeasuredPart

_ROW_INCHES, _MOST_NUMBERS = 0.32, 12


def write(report: PairReport, path: str | pathlib.Path) -> None:
    """Draw to `path` with `.svg`, `.png` and `.pdf` added; see `draw` and
    `pa_fast.sweep.figure.save`.

    Raises:
        OutputError: `path` lies in a checkpoint of the pair; or see
            `pa_fast.sweep.figure.check_output_path`.
    """
    check_outside(path, (report.base.folder, report.instruct.folder))
    figure.check_output_path(pathlib.Path(path))
    figure.save(lambda: draw(report), pathlib.Path(path))


def draw(report: PairReport) -> Figure:
    """Draw ‖I − B‖ / ‖B‖ as colours on a log scale: modules down, layers across, and modules
    outside all layers below.

    Raises:
        UsageError: the report has no measured weights, or nothing differs.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    parts = report.measured.tensors if report.measured else ()
    norms = sorted(part.relative_norm for part in parts if part.relative_norm)
    if not norms:
        raise UsageError(
            "nothing to draw: no difference was measured", "measure one: --sample or --full"
        )
    inside: dict[tuple[str, int], list[MeasuredPart]] = {}
    for part in parts:
        if part.layer is not None:
            inside.setdefault((part.module, part.layer), []).append(part)
    outside = [part for part in parts if part.layer is None]
    modules = list(dict.fromkeys(module for module, _ in inside))
    layers = sorted({layer for _, layer in inside})
    norm = LogNorm(norms[0], max(norms[-1], norms[0] * 1.01))
    heights = [height for height in (len(modules), len(outside)) if height]
    size = (figure.WIDTH_INCHES, 1.5 + _ROW_INCHES * sum(heights) + 0.4 * len(heights))
    drawing = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    panels = list(drawing.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if modules:
        names = short_names(modules, modules)
        cells = [
            [_norm_of(inside.get((module, layer), [])) for layer in layers] for module in modules
        ]
        _panel(panels[0], cells, [names[module] for module in modules], norm)
        step = max(1, math.ceil(len(layers) / 20))
        panels[0].set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        panels[0].set_xlabel("layer")
    if outside:
        _panel(
            panels[-1],
            [[_norm_of([part])] for part in outside],
            [part.module for part in outside],
            norm,
        )
        panels[-1].set_xticks([])
    sampled = "   from a sample" if report.measured and report.measured.is_sampled else ""
    unchanged = "" if all(part.relative_norm for part in parts) else "   white: no difference"
    panels[0].set_title(f"size of the delta   ‖I − B‖ / ‖B‖{sampled}{unchanged}", pad=10)
    bar = drawing.colorbar(panels[0].images[0], ax=panels, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(length=3)
    return drawing


def _norm_of(parts: Sequence[MeasuredPart]) -> float:
    norm = joint_norm(parts)
    return math.nan if norm is None else norm


def _panel(
    axes: Axes, cells: Sequence[Sequence[float]], names: Sequence[str], norm: LogNorm
) -> None:
    """Draw one block of the map, with numbers in it if it has few columns. What did not change is
    left white."""
    from matplotlib import colormaps

    axes.imshow(cells, cmap="YlGnBu", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row, values in enumerate(cells):
        for column, value in enumerate(values if len(values) <= _MOST_NUMBERS else ()):
            dark = value > 0 and sum(colormaps["YlGnBu"](float(norm(value)))[:3]) < 1.5
            text = "" if math.isnan(value) else f"{value:.2g}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if dark else INK,
            )

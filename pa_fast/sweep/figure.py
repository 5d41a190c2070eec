"""The trajectory figure: every score along λ, and the trade-off where there are two of them."""

from __future__ import annotations

import io
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pa_fast import files
from pa_fast.errors import OutputError, PaFastError, first_line
from pa_fast.sweep import trade_off, trajectory
from pa_fast.sweep.results import SweepResult
from pa_fast.sweep.trajectory import FAINT, INK, Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = "pa_fast"
FORMATS = ("svg", "png", "pdf")
_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": _MARK},
    "png": {"Software": None, "Comment": _MARK},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": _MARK},
}
MAX_ROWS = 4
LARGEST_DRAWN = 1e300
"""Larger scores are not drawn: differences and margins of the axes would overflow."""
_CHARACTERS = 10.0  # of text an inch, in the size of titles
WIDTH_INCHES = 10.0  # at 100 dpi the 1000 pixels of a README; the PNG has twice as many
COLOURS = ("#1f6fb4", "#d9541e", "#2a8f5a", "#8253b8", "#b3892b", "#c2447e", "#3a8f95", "#6b6f76")
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "pa_fast",
    "pdf.fonttype": 42,  # journals refuse the default's
    "text.parse_math": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def write(result: SweepResult) -> str | None:
    """Draw `trajectory.svg`, `.png` and `.pdf` into the run folder; nothing where no point is
    finished.

    Returns:
        The reason in one line if the results cannot be drawn; an older figure, of other results, is
        then removed. None otherwise.

    Raises:
        OutputError: the files cannot be written.
    """
    if not result.rows:
        return None
    why = next(
        (
            f"`{row.evaluator}` scored {row.score:.4g}"
            for row in result.rows
            if abs(row.score) > LARGEST_DRAWN
        ),
        None,
    )
    try:
        if why is None:
            save(lambda: draw(result), result.out / "trajectory")
            return None
        why += f", and {LARGEST_DRAWN:g} is the most that an axis can show"
    except PaFastError:
        raise
    except Exception as error:
        # the results are written; an error in the figure must not hide them
        why = f"{type(error).__name__}: {first_line(error)}"
    for kind in FORMATS:
        (result.out / f"trajectory.{kind}").unlink(missing_ok=True)
    return f"no figure was drawn: {why}"


def save(make: Callable[[], Figure], path: pathlib.Path) -> None:
    """Write what `make` draws, in the style of this project, to `path` with `.svg`, `.png` and
    `.pdf` added.

    Numerics: equal drawings give equal files under one version of matplotlib: no date, no host,
    fixed ids.
    """
    import matplotlib

    with matplotlib.rc_context():
        # a matplotlibrc of the user would otherwise change the file
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        for kind, data in _rendered(make()).items():
            files.write(
                path.with_name(f"{path.name}.{kind}"),
                data,
                "make room or grant access, then draw it again",
            )


def _rendered(drawing: Figure) -> dict[str, bytes]:
    """Return `drawing` in each of FORMATS, laid out once for all of them."""
    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")
    rendered = {}
    for kind in FORMATS:
        data = io.BytesIO()
        drawing.savefig(data, format=kind, dpi=200, metadata=_METADATA[kind])
        rendered[kind] = data.getvalue()
    return rendered


def check_output_path(path: pathlib.Path) -> None:
    """Raise OutputError if `save` has no folder for `path`, may not write there, or would replace a
    file that it did not draw.

    Call it before long work, not after.
    """
    if not path.parent.is_dir():
        raise OutputError(
            f"{path.parent} is no folder, and the figure {path.name} belongs there",
            "make it, or choose another one",
        )
    if not os.access(path.parent, os.W_OK):
        raise OutputError(
            f"{path.parent}: no figure may be written there",
            "grant access, or choose another folder",
        )
    for kind in FORMATS:
        file = path.with_name(f"{path.name}.{kind}")
        if os.path.lexists(file) and not _is_drawn(file):
            raise OutputError(
                f"{file} exists, and pa_fast did not draw it", "choose another name for the figure"
            )


def _is_drawn(path: pathlib.Path) -> bool:
    """Return whether `save` wrote `path`: whether its mark is at the beginning, in a PDF at the
    end."""
    try:
        with os.fdopen(files.open_own(path, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(2000)
            if data.startswith(b"%PDF"):
                file.seek(max(size - 200_000, 0))
                data = file.read(200_000)
            return _MARK.encode() in data
    except (OSError, OutputError):
        return False


def draw(result: SweepResult) -> Figure:
    """Return the figure of `result`: one panel per unit, its evaluators as lines; with two
    evaluators also their trade-off."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = lines_of(result)
    panels: dict[tuple[str, bool], list[Line]] = {}
    for line in lines:
        panels.setdefault((line.unit, line.higher_is_better), []).append(line)
    columns = math.ceil(len(panels) / MAX_ROWS)
    rows = math.ceil(len(panels) / columns)
    both = len(lines) == 2 and len(trade_off.common(*lines)) > 1
    height = 4.3 if rows == 1 else 1.0 + 2.35 * rows
    figure = Figure(
        figsize=(WIDTH_INCHES, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    grid = figure.add_gridspec(rows, columns + both, width_ratios=[1.5] * columns + [1.0] * both)
    for index, group in enumerate(panels.values()):
        column, row = divmod(index, rows)
        lowest = row == rows - 1 or index == len(panels) - 1
        share = 1.5 / (1.5 * columns + both)
        trajectory.draw(
            figure.add_subplot(grid[row, column]),
            group,
            lowest,
            (WIDTH_INCHES * share - 0.9) * _CHARACTERS,
        )
    if result.approximation is not None:
        # smaller and apart, but on the picture itself, which is copied without its folder
        figure.supxlabel(
            f"approximate delta: {result.approximation}",
            x=0.01,
            ha="left",
            fontsize=9,
            color="#7b8490",
        )
    if both:
        axes = figure.add_subplot(grid[:, -1])
        trade_off.draw(
            axes,
            lines[0],
            lines[1],
            WIDTH_INCHES / (1.5 * columns + 1) * _CHARACTERS,
            height * _CHARACTERS,
        )
        figure.draw_without_rendering()
        trade_off.name_points(axes, *lines)
    return figure


def lines_of(result: SweepResult) -> list[Line]:
    lines = []
    failed: dict[str, list[float]] = {}
    for failure in result.failures:
        failed.setdefault(failure.evaluator, []).append(float(failure.lam))
    for name, higher, colour in zip(
        result.evaluators, result.higher_is_better, itertools.cycle(COLOURS)
    ):
        rows = result.scores(name)
        if rows:
            line = Line(
                name=name,
                unit=next(iter(rows.values())).unit,
                higher_is_better=higher,
                keys=tuple(lam.key for lam in result.lambdas),
                lams=tuple(float(lam) for lam in result.lambdas),
                scores=tuple(
                    rows[lam.key].score if lam.key in rows else math.nan for lam in result.lambdas
                ),
                failed=tuple(failed.get(name, ())),
                colour=colour,
            )
            lines.append(line)
    return lines

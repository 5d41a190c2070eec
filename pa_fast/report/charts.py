"""Charts of the report page as Vega-Lite specifications: data and marks, in the page's own colours.

Source: https://vega.github.io/vega-lite/docs/, version 5 and later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Chart = dict[str, Any]
ChartRows = Sequence[Mapping[str, Any]]

COLOURS = ("#2f7fc1", "#d9541e", "#2a8f5a", "#9364c8", "#b3892b", "#c2447e", "#3a8f95", "#80858d")
_WIDTH = 720
_MOST_NUMBERS = 12
"""Layers whose sizes are written out."""
_LAMBDA = {
    "field": "lambda",
    "type": "quantitative",
    "title": "λ",
    "scale": {"nice": False},
    "axis": {"grid": False, "format": "~g", "tickCount": 10},
}
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "#8888",
        "tickColor": "#8888",
        "gridColor": "#8883",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "header": {"labelColor": "currentColor", "labelFontSize": 12},
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 12,
        "labelLimit": 320,
        "symbolOpacity": 1,
        "orient": "top",
        "title": None,
    },
}


def _chart(**parts: Any) -> Chart:
    # without `$schema`: the library that draws it may be of a later version, and would warn
    return {"width": _WIDTH, "config": _CONFIG, **parts}


def _colour(field: str, names: Iterable[str]) -> Chart:
    names = list(dict.fromkeys(names))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    legend = {} if len(names) > 1 else {"legend": None}
    scale = {"domain": names, "range": colours}
    return {"field": field, "type": "nominal", "scale": scale, **legend}


def differences(rows: ChartRows, chosen: Mapping[str, float], unit: str) -> Chart:
    """Return the objective's difference to λ = 1 along λ, with its simultaneous band; the set of λ*
    is shaded, λ̂ a dashed line.

    Args:
        rows: of `RunReport.differences`, one evaluator of each run.
        chosen: λ̂ by run.
        unit: of the difference.
    """
    colour = _colour("run", (row["run"] for row in rows))
    x = _LAMBDA
    y = {"field": "diff", "type": "quantitative", "title": f"difference to λ = 1 ({unit})"}
    shaded = [
        {"run": run, "from": low, "to": high}
        for run in dict.fromkeys(row["run"] for row in rows)
        for low, high in _stretches([row for row in rows if row["run"] == run])
    ]
    marked = [{"run": run, "lambda": lam} for run, lam in chosen.items()]
    tooltip = [
        {"field": "run", "title": "run"},
        {"field": "key", "title": "λ"},
        *(
            {"field": name, "title": title, "type": "quantitative", "format": ".3"}
            for name, title in (
                ("score", "score"),
                ("diff", "difference"),
                ("low", "from"),
                ("high", "to"),
                ("p_adj", "adjusted p"),
            )
        ),
    ]
    return _chart(
        height=300,
        layer=[
            {
                "data": {"values": shaded},
                "mark": {"type": "rect", "opacity": 0.1},
                "encoding": {
                    "x": {"field": "from", "type": "quantitative"},
                    "x2": {"field": "to"},
                    "color": colour,
                },
            },
            {"data": {"values": [{"zero": 0}]}, "mark": {"type": "rule", "color": "#888"}}
            | {"encoding": {"y": {"field": "zero", "type": "quantitative"}}},
            {
                "data": {"values": marked},
                "mark": {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5},
                "encoding": {"x": x, "color": colour},
            },
            {
                "data": {"values": list(rows)},
                "encoding": {"x": x, "color": colour},
                "layer": [
                    {
                        "mark": {"type": "area", "opacity": 0.22},
                        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
                    },
                    {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"y": y}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
                        "encoding": {"y": y, "tooltip": tooltip},
                    },
                ],
            },
        ],
    )


def _stretches(rows: ChartRows) -> Iterable[tuple[float, float]]:
    """Yield the stretches of λ in the set, each reaching half way to the λ beside it."""
    lams = [row["lambda"] for row in rows]
    edges = [lams[0], *((a + b) / 2 for a, b in pairwise(lams)), lams[-1]]
    start: float | None = None
    for index, row in enumerate(rows):
        if row["in_set"] and start is None:
            start = edges[index]
        if start is not None and (not row["in_set"] or index == len(rows) - 1):
            yield start, edges[index + 1] if row["in_set"] else edges[index]
            start = None


def frontier(rows: ChartRows, x: str, y: str, higher: tuple[bool, bool]) -> Chart:
    """Return one score against another, a cross of intervals for each λ; filled where no other λ
    dominates it.

    Args:
        rows: of `RunReport.frontier`.
        x, y: what the axes show.
        higher: whether more is better across, and upwards; else that axis is turned.
    """
    colour = _colour("run", (row["run"] for row in rows))
    axes = {}
    for name, title, is_higher in (("x", x, higher[0]), ("y", y, higher[1])):
        scale = {"zero": False} | ({} if is_higher else {"reverse": True})
        axes[name] = {"field": name, "type": "quantitative", "title": title, "scale": scale}
    shared = {"color": colour}
    places: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row["key"] in ("0", "1") or row["free"]:
            places.setdefault((row["x"], row["y"]), []).append(row["key"])
    named = [{"x": a, "y": b, "key": _listed(keys)} for (a, b), keys in places.items()]
    return _chart(
        height=360,
        data={"values": list(rows)},
        layer=[
            {
                "mark": {"type": "rule", "opacity": 0.35},
                "encoding": shared
                | {"x": {**axes["x"], "field": "x_low"}, "x2": {"field": "x_high"}, "y": axes["y"]},
            },
            {
                "mark": {"type": "rule", "opacity": 0.35},
                "encoding": shared
                | {"y": {**axes["y"], "field": "y_low"}, "y2": {"field": "y_high"}, "x": axes["x"]},
            },
            {
                "mark": {"type": "line", "opacity": 0.5, "strokeWidth": 1.2},
                "encoding": shared | {**axes, "order": {"field": "lambda", "type": "quantitative"}},
            },
            {
                "mark": {"type": "point", "size": 70, "strokeWidth": 1.6, "opacity": 1},
                "encoding": shared
                | {
                    **axes,
                    "fill": {
                        "condition": {"test": "datum.free", **colour},
                        "value": "transparent",
                    },
                    "tooltip": [
                        {"field": "run", "title": "run"},
                        {"field": "key", "title": "λ"},
                        {"field": "x", "type": "quantitative", "format": ".4", "title": x},
                        {"field": "y", "type": "quantitative", "format": ".4", "title": y},
                    ],
                },
            },
            {
                "data": {"values": named},
                "mark": {"type": "text", "dy": -12, "fontSize": 11, "color": "currentColor"},
                "encoding": {**axes, "text": {"field": "key"}},
            },
        ],
    )


def _listed(keys: Sequence[str]) -> str:
    """Return the names of λ that lie on one another."""
    keys = list(dict.fromkeys(keys))
    return ", ".join(keys) if len(keys) < 4 else f"{keys[0]} … {keys[-1]}"


def scores(rows: ChartRows, field: str, title: str) -> Chart:
    """Return `field` of the rows along λ, a line for each evaluator and run.

    Args:
        rows: of `RunReport.scores`, in one unit.
    """
    lines = [{**row, "line": row["evaluator"]} for row in rows]
    if len({row["run"] for row in rows}) > 1:
        lines = [{**row, "line": f"{row['run']}: {row['evaluator']}"} for row in rows]
    y = {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False}}
    colour = _colour("line", (line["line"] for line in lines))
    tooltip = [
        {"field": "line", "title": "evaluator"},
        {"field": "key", "title": "λ"},
        {"field": field, "type": "quantitative", "format": ".4", "title": title},
    ]
    return _chart(
        height=220,
        data={"values": lines},
        encoding={"x": _LAMBDA, "y": y, "color": colour},
        layer=[
            {"mark": {"type": "line", "strokeWidth": 2}},
            {
                "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
                "encoding": {"tooltip": tooltip},
            },
        ],
    )


def delta_sizes(rows: ChartRows) -> Chart:
    """Return ‖I − B‖ / ‖B‖ as colours on a log scale: modules down, layers across; with numbers
    where there are few layers.

    Args:
        rows: `module`, `layer` and `norm`, which is above 0, of each part.
    """
    norms = [row["norm"] for row in rows]
    modules, layers = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("module", "layer")
    )
    middle = math.sqrt(min(norms) * max(norms))
    scale = {"type": "log", "scheme": "viridis", "nice": False}
    size = {"field": "norm", "type": "quantitative", "title": "‖I − B‖ / ‖B‖"}
    axis = {"ticks": False, "domain": False, "labelPadding": 6}
    thinned = {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": 8}
    position = {
        "x": {"field": "layer", "type": "ordinal", "title": "layer", "axis": axis | thinned},
        "y": {"field": "module", "type": "nominal", "title": None, "sort": modules}
        | {"axis": axis | {"labelLimit": 220}},
    }
    tooltip = [
        {"field": "module", "title": "module"},
        {"field": "layer", "title": "layer"},
        {**size, "format": ".3"},
    ]
    legend = {"title": size["title"], "format": ".2~g", "gradientLength": 150, "tickCount": 3}
    legend |= {"titleFontSize": 12, "titleFontWeight": "normal"}
    layer: list[Chart] = [
        {
            "mark": {"type": "rect"},
            "encoding": {"color": {**size, "scale": scale, "legend": legend}, "tooltip": tooltip},
        }
    ]
    if len(layers) <= _MOST_NUMBERS:
        dark = {"condition": {"test": f"datum.norm < {middle}", "value": "#fff"}, "value": "#111"}
        text = {"field": "norm", "type": "quantitative", "format": ".2"}
        layer.append(
            {"mark": {"type": "text", "fontSize": 11}, "encoding": {"text": text, "color": dark}}
        )
    return _chart(
        height=24 * len(modules), data={"values": list(rows)}, encoding=position, layer=layer
    )

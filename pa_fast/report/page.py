"""The report page: one HTML file that needs nothing else, readable without JavaScript."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pa_fast.report import charts
from pa_fast.report.charts import Chart
from pa_fast.report.contents import RunReport
from pa_fast.sweep.results import score_text
from pa_fast.units import format_seconds

if TYPE_CHECKING:
    from jinja2 import Environment

MISSING_EXTRA = (
    "report.html has tables alone: charts need `vl-convert-python` (pip install 'pa_fast[report]')"
)


def page(runs: Sequence[RunReport]) -> tuple[str, str | None]:
    """Return the page of one run or several as HTML, and a note where charts are left out.

    It holds the charting library, and asks nothing of the network.

    Cost: about 1.1 MB, and up to 30 kB a chart.
    """
    sections = [section for section in _sections(runs) if section["charts"] or section["tables"]]
    drawings, script, note = _drawings(
        [chart for section in sections for chart in section["charts"]]
    )
    numbers = iter(drawings)
    for section in sections:
        section["charts"] = [next(numbers) for _ in section["charts"]]
        section["charts"] = [chart for chart in section["charts"] if chart is not None]
    template = _environment().get_template("page.html.j2")
    html = template.render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        many=len(runs) > 1,
        sections=[section for section in sections if section["charts"] or section["tables"]],
        changed=[item for run in runs for item in run.changed()],
        script=script,
    )
    return html, note


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pa_fast.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, signed=_signed, duration=format_seconds, json=_embedded
    )
    return environment


def _drawings(specs: Sequence[Chart]) -> tuple[list[dict[str, Any] | None], str, str | None]:
    """Return each chart as its specification and a drawing of it, the library that draws it again,
    and a note; without the library no charts."""
    try:
        import vl_convert
    except ImportError:
        return [None] * len(specs), "", MISSING_EXTRA if specs else None
    drawings: list[dict[str, Any] | None] = [
        {"spec": spec, "svg": vl_convert.vegalite_to_svg(spec)} for spec in specs
    ]
    return drawings, _charting_library() if specs else "", None


@functools.cache
def _charting_library() -> str:
    """Return the script that draws charts, which takes a second to bundle: the same for every page
    that a sweep writes again."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _sections(runs: Sequence[RunReport]) -> Iterable[dict[str, Any]]:
    thinned = _thinned(runs)
    yield _section("Difference to λ = 1", *_difference_charts(runs), note=f"{_BAND} {thinned}")
    yield _section("Two scores", *_frontier_charts(runs), note=_FRONTIER)
    yield _section("Scores along λ", *_score_charts(runs), note=thinned)
    yield _section("By task, at the chosen λ", tables=[_task_table(runs)])
    yield _section("By λ", tables=[_lambda_table(run) for run in runs], note=thinned)
    yield _section("Effective λ", *_effective_charts(runs), note=_EFFECTIVE)
    yield from _delta_sections(runs)
    yield _section("Time", tables=[_time_table(run) for run in runs])


_NOTHING = 1e-9
"""Differences below it come from rounding."""
_BAND = (
    "The band holds at all λ at once, at 95 %. Shaded: the λ that may be the best. Dashed: the"
    " chosen λ."
)
_FRONTIER = "Filled: no other λ is better on both. Crosses: 95 % of each score by itself."
_SIZE = "How far instruct is from base, ‖I − B‖ / ‖B‖, by layer and module."
_SAMPLE = "From a sample of every tensor."
_EFFECTIVE = "Where rounding to the live dtype has left the weights, between base and instruct."


def _section(
    title: str, *charts: Chart, tables: Iterable[dict[str, Any]] = (), note: str = ""
) -> dict[str, Any]:
    kept = [table for table in tables if table["rows"]]
    return {"title": title, "charts": list(charts), "tables": kept, "note": note}


def _difference_charts(runs: Sequence[RunReport]) -> Iterable[Chart]:
    """Yield a chart for each set of runs that share an objective and its scale."""
    groups: dict[tuple[str, str], list[RunReport]] = {}
    for run in runs:
        if run.answer is not None and run.answer.objective.refused is None:
            one = run.answer.objective
            unit = "points" if one.scale == 100 else one.unit
            groups.setdefault((one.name, unit), []).append(run)
    for (name, unit), members in groups.items():
        rows = [r for run in members for r in run.differences() if r["evaluator"] == name]
        if len({row["key"] for row in rows}) > 1:
            chosen = {run.name: float(run.answer.chosen) for run in members if run.answer}
            yield charts.differences(rows, chosen, f"{name}, {unit}")


def _frontier_charts(runs: Sequence[RunReport]) -> Iterable[Chart]:
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    higher: dict[tuple[str, str], tuple[bool, bool]] = {}
    for run in runs:
        for other in () if run.answer is None else run.answer.others:
            assert run.answer is not None
            names = run.answer.objective.name, other.name
            if rows := run.frontier(other):
                pairs.setdefault(names, []).extend(rows)
                higher[names] = run.answer.objective.higher_is_better, other.higher_is_better
    for (x, y), rows in pairs.items():
        yield charts.frontier(rows, x, y, higher[x, y])


def _score_charts(runs: Sequence[RunReport]) -> Iterable[Chart]:
    units: dict[str, list[dict[str, Any]]] = {}
    for row in itertools.chain.from_iterable(run.scores() for run in runs):
        units.setdefault(row["unit"], []).append(row)
    for unit, rows in units.items():
        yield charts.scores(rows, "score", unit)


def _effective_charts(runs: Sequence[RunReport]) -> Iterable[Chart]:
    rows = {
        (r["run"], r["key"]): r for run in runs for r in run.scores() if r["effective"] is not None
    }
    shown = [{**row, "evaluator": "effective λ"} for row in rows.values()]
    if shown:
        yield charts.scores(shown, "effective", "effective λ")


def _delta_sections(runs: Sequence[RunReport]) -> Iterable[dict[str, Any]]:
    """Yield a section for each pair whose sizes are known."""
    for sizes in dict.fromkeys(run.sizes for run in runs if run.sizes is not None):
        rows = [asdict(part) for part in sizes.parts if part.norm > 0]
        inside = [row for row in rows if row["layer"] is not None]
        outside = [[row["module"], _number(row["norm"])] for row in rows if row["layer"] is None]
        notes = [_SIZE] + [_SAMPLE] * sizes.is_sampled
        notes += ["Empty: no difference."] * any(part.norm == 0 for part in sizes.parts)
        yield _section(
            "Size of the delta",
            *([charts.delta_sizes(inside)] if inside else []),
            tables=[_table(["module outside the layers", "‖I − B‖ / ‖B‖"], outside)],
            note=" ".join(notes),
        )


def _task_table(runs: Sequence[RunReport]) -> dict[str, Any]:
    many = len(runs) > 1
    head = ["evaluator", "task", "λ", "s(0)", "s(λ)", "s(1)", "difference", "95 % band"]
    head += ["adjusted p", "wins", "losses", "items", "cut", "ties"]
    rows = []
    for row in itertools.chain.from_iterable(run.tasks() for run in runs):
        cells = [row["evaluator"], row["task"], row["key"]]
        cells += [_number(row[name]) for name in ("base", "chosen", "instruct")]
        cells += [_signed(row.get("diff")), _span(row.get("low"), row.get("high"))]
        cells += [_probability(row.get("p_adj"))]
        cells += [*(_count(row.get(n)) for n in ("wins", "losses", "n"))]
        cells += [_share(row.get("truncated")), _share(row.get("ties"))]
        rows.append(([row["run"]] if many else []) + cells)
    return _table((["run"] if many else []) + head, rows)


def _lambda_table(run: RunReport) -> dict[str, Any]:
    known = {(row["evaluator"], row["key"]): row for row in run.differences()}
    head = ["λ", "effective λ", "evaluator", "score", "difference", "95 % band", "adjusted p"]
    rows = []
    for score in run.scores():
        row = known.get((score["evaluator"], score["key"]), {})
        rows.append(
            [
                score["key"],
                _number(score["effective"]),
                score["evaluator"],
                _number(score["score"]),
                _signed(row.get("diff")),
                _span(row.get("low"), row.get("high")),
                _probability(row.get("p_adj")),
                "yes" if row.get("in_set") else "",
            ]
        )
    return _table([*head, "may be best"], rows, run.name)


def _time_table(run: RunReport) -> dict[str, Any]:
    spent = dict(run.seconds())
    total = sum(spent.values()) or 1.0
    rows = [
        [what, format_seconds(seconds), f"{100 * seconds / total:.1f} %"]
        for what, seconds in spent.items()
    ]
    return _table(["what", "time", "share"], rows, run.name)


def _thinned(runs: Sequence[RunReport]) -> str:
    count = max(
        (one.left_out for run in runs if run.answer for one in run.answer.findings), default=0
    )
    return f"{count:,} λ are left out, evenly: results.csv has all." if count else ""


def _table(head: list[str], rows: list[list[str]], name: str = "") -> dict[str, Any]:
    """Return a table without the columns that are empty."""
    used = [k for k in range(len(head)) if any(row[k] for row in rows)]
    return {
        "name": name,
        "head": [head[k] for k in used],
        "rows": [[row[k] for k in used] for row in rows],
    }


def _number(value: float | None) -> str:
    return "" if value is None else score_text(value).replace("-", "−")


def _probability(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 1e-4 else _number(value)


def _signed(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if abs(value) < _NOTHING else f"{value:+.3g}".replace("-", "−")


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_signed(low)} to {_signed(high)}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _embedded(value: Any) -> str:
    """Return JSON for a script element, which no text in it can end."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")

"""Tables that `pa-fast inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pa_fast.base import Lambda
from pa_fast.checkpoint.inspect import PairReport
from pa_fast.checkpoint.measure import short_names
from pa_fast.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

    from pa_fast.checkpoint.measure import Measured, MeasuredPart


def parts(report: PairReport) -> Iterator[Table | str]:
    """Yield the tables and lines of a report: the pair and, if weights were measured, its modules,
    the sizes of its stores, and the fidelity of each λ. Folders and notes, which may be long, are
    lines of their own."""
    yield f"{report.model_type}: these two pair"
    for name, side in (("base", report.base), ("instruct", report.instruct)):
        yield f"{name + ':':10} {side.folder}"
    yield ""
    yield _pair(report)
    yield ""
    head = "tied head" if report.tied else "own head"
    yield f"merged: {report.parameters:,} parameters, {_counts(report.live_dtypes)}, {head}"
    for difference in report.differences:
        if not difference.reason:  # what was let through for a reason is among the notes
            yield f"config differs: {difference}: harmless"
    for note in report.notes:
        yield f"note: {note}"
    if report.measured is None:
        yield "weights not read: --sample or --full measures how far they are apart"
    else:
        for table in (_modules, _stores, _distances):
            yield ""
            yield table(report.measured)
        if report.measured.total.fidelity:
            yield ""
            yield _fidelity(report.measured)


def _pair(report: PairReport) -> Table:
    sides = (report.base, report.instruct)
    table = _table("", "", "base", "instruct", numbers=False)
    table.add_row(
        "weights",
        *(f"{format_bytes(side.bytes)} in {format_count(side.shards, 'file')}" for side in sides),
    )
    table.add_row("dtypes", *(_counts(side.dtypes) for side in sides))
    if report.measured:
        table.add_row("quick fingerprint", *(str(side.quick_fingerprint) for side in sides))
    return table


def _modules(measured: Measured) -> Table:
    read = (
        f"a sample of {measured.total.measured:,} weights"
        if measured.is_sampled
        else f"all {measured.total.measured:,} weights"
    )
    columns = (
        "parameters",
        "‖I − B‖ / ‖B‖",
        "unchanged",
        "other sign",
        "other binade",
        "|k| median",
    )
    table = _table(f"how far apart: {read}", "module", *columns)
    names = short_names(
        (part.name for part in measured.modules),
        {p.module for p in measured.tensors if p.layer is not None},
    )
    for part in measured.modules:
        table.add_row(names[part.name], *_figures(part))
    table.add_section()
    table.add_row("all", *_figures(measured.total))
    return table


def _figures(part: MeasuredPart) -> tuple[str, ...]:
    norm = "" if part.relative_norm is None else f"{part.relative_norm:.3g}"
    shares = (part.unchanged, part.sign_crossings, part.binade_crossings)
    return (
        f"{part.parameters:,}",
        norm,
        *(f"{share:.2%}" for share in shares),
        _median(part.histogram),
    )


def _median(histogram: tuple[int, ...]) -> str:
    """Return the name of the bucket that holds the median of |k|."""
    seen, total = 0, sum(histogram)
    for bucket, count in enumerate(histogram):
        seen += count
        if total and 2 * seen >= total:
            return bucket_name(bucket)
    return ""


def bucket_name(bucket: int) -> str:
    """Return the name of a bucket of the histogram, its range of |k|: `0`, `1`, `2–3`, `4–7`, …"""
    return str(bucket) if bucket < 2 else f"{2 ** (bucket - 1)}–{2**bucket - 1}"


def _stores(measured: Measured) -> Table:
    table = _table("beside the live copy", "store", "bytes", "per parameter")
    total = measured.total
    for name, size in vars(total.stores).items():
        table.add_row(name, format_bytes(size), f"{size / max(total.parameters, 1):.3g}")
    return table


def _distances(measured: Measured) -> Table:
    table = _table(
        "distance on the grid, weights of equal sign: k = bits(I) − bits(B)",
        "|k|",
        "weights",
        "share",
    )
    histogram = measured.total.histogram
    for bucket, count in enumerate(histogram):
        if count:
            table.add_row(bucket_name(bucket), f"{count:,}", f"{count / sum(histogram):.2%}")
    return table


def _fidelity(measured: Measured) -> Table:
    ruled = any(_has_other_lambda(part) for part in measured.tensors)
    intended = ("intended λ",) if ruled else ()
    table = _table(
        "λ fidelity",
        "λ",
        *intended,
        "effective λ",
        "weights moved",
        "lowest module",
        "highest module",
    )
    names = short_names(
        (part.name for part in measured.modules),
        {p.module for p in measured.tensors if p.layer is not None},
    )
    for index, whole in enumerate(measured.total.fidelity):
        effective = [
            (part.fidelity[index].effective_lambda, names[part.name]) for part in measured.modules
        ]
        known = sorted((value, name) for value, name in effective if value is not None)
        extremes = [f"{value:.4g}  {name}" for value, name in known[:1] + known[-1:]] or ["", ""]
        figures = [*([whole.intended_lambda] if ruled else []), whole.effective_lambda]
        table.add_row(
            whole.lam,
            *("" if one is None else f"{one:.4g}" for one in figures),
            f"{whole.moved:.2%}",
            *extremes,
        )
    return table


def _has_other_lambda(part: MeasuredPart) -> bool:
    """Return True if a rule gives this part another λ than the swept one."""
    return any(one.intended_lambda != float(Lambda(one.lam)) for one in part.fidelity)


def _table(title: str, *columns: str, numbers: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and numbers else "left")
    return table


def _counts(dtypes: dict[str, int]) -> str:
    return ", ".join(f"{count} × {dtype}" for dtype, count in dtypes.items())

"""The command `bench`, which times this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pa_fast.cli.options import Json
from pa_fast.cli.output import show, tell_json
from pa_fast.terminal import say
from pa_fast.units import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from pa_fast.throughput import Throughput

_NOISY = 1.5
"""Two timings of one way that differ by more say little of others."""


def bench(
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, or auto.")] = "auto",
    shape: Annotated[
        str,
        typer.Option(
            metavar="S", help="1b, 8b, 70b or a checkpoint folder; auto: 8b on a GPU, 1b on a CPU."
        ),
    ] = "auto",
    rounds: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Timed runs of each switch; the median is shown."),
    ] = 5,
    as_json: Json = False,
) -> None:
    """Time switches of synthetic weights on this machine.

    Also measures the limits of the machine, and counts the bytes of each store. Every switch is
    checked bit by bit before it is timed; dense and sparse switches are timed twice, to show the
    noise.
    """
    from pa_fast.throughput import measure

    result = measure(device, shape, rounds, say)
    if as_json:
        tell_json(result.to_json())
    else:
        show(_throughput_table(result))
    for relative, table in result.pairs.items():
        if (noise := table.noise) and max(noise, 1 / noise) > _NOISY:
            say(
                f"note: dense at ‖I − B‖ / ‖B‖ = {relative:g}, timed twice, differs by"
                f" {max(noise, 1 / noise):.2g} ×: something else uses this machine, and ratios here"
                " are no better than that"
            )


def _throughput_table(result: Throughput) -> Table:
    from rich import box
    from rich.table import Table

    title = (
        f"{result.machine}, torch {result.torch}: {result.weights / 1e9:.2f} G bf16 weights in"
        f" {result.tensors} tensors"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("", "‖I − B‖ / ‖B‖", "bytes per weight", "ms", "GB/s", "× dense", "encoded in"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    dense = {row["relative_delta"]: row["seconds"] for row in result.rows if row["what"] == "dense"}
    for row in result.rows:
        relative, seconds, kept = row["relative_delta"], row["seconds"], row["bytes_per_weight"]
        if row["what"] == "dense" or relative is None:
            table.add_section()
        table.add_row(
            row["what"],
            "" if relative is None else f"{relative:g}",
            "" if kept is None else f"{kept:.3f}",
            f"{seconds * 1000:.4g}",
            f"{row['gbps']:.4g}",
            "" if relative is None else f"{seconds / dense[relative]:.2f}",
            "" if row["encode_s"] is None else format_seconds(row["encode_s"]),
        )
    return table

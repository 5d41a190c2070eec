"""The commands `encode`, which writes a delta file, and `lora`, which converts one to a LoRA
folder."""

from __future__ import annotations

from typing import Annotated

import typer

from pa_fast.cli.options import (
    AllowNonfinite,
    Base,
    Dtype,
    IgnoreConfig,
    Instruct,
    Json,
    OneSided,
    StripPrefix,
)
from pa_fast.cli.output import tell_json
from pa_fast.errors import UsageError
from pa_fast.terminal import say, tell
from pa_fast.units import format_bytes, format_count


def encode(
    base: Base,
    instruct: Instruct,
    format: Annotated[
        str,
        typer.Option(
            metavar="F",
            help="dense, packed or sparse, which keep every bit by default; or lowrank.",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The delta file to write.")],
    range_: Annotated[
        str | None,
        typer.Option(
            "--range", metavar="LO:HI", help="packed: least and largest λ; 0:1 by default."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="L",
            help="packed: size, or speed (for GPUs, 3 to 5 % more bytes); size by default.",
        ),
    ] = None,
    select: Annotated[
        str | None, typer.Option(metavar="S", help="sparse: exact, topk, ties or dare.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(metavar="D", help="topk, ties, dare: share of the weights, in (0, 1]."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="S", help="topk: tensor (by default) or global: what D is a share of."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="lowrank: rank of every matrix, from 1 on; 64 by default."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="lowrank: share of ‖I − B‖² that each matrix keeps."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(metavar="BYTES", help="lowrank: bytes of the whole delta.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of dare and of the decomposition; 0 by default."),
    ] = None,
    dtype: Dtype = "auto",
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE, if it is a delta.")
    ] = False,
    one_sided: OneSided = None,
    ignore_config: IgnoreConfig = None,
    strip_prefix: StripPrefix = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also compare with the exact merge on this text."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the delta between two checkpoints to a file.

    `pa-fast sweep BASE --delta FILE` then needs no INSTRUCT.
    """
    from pa_fast.encoding import encode as run

    report = run(
        base,
        instruct,
        out,
        format,
        select=select,
        density=density,
        scope=scope,
        rank=rank,
        energy=energy,
        budget=budget,
        seed=seed,
        range=_range(range_),
        layout=layout,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        text=text,
        one_sided=one_sided,
        ignore_config=ignore_config or (),
        strip_prefix=strip_prefix or (),
    )
    if as_json:
        tell_json(report.to_json())
        return
    kept = (
        "loses nothing"
        if report.lossless
        else f"relative error {report.relative_error:.3g}, ‖D′‖² / ‖D‖² {report.energy:.3g}"
    )
    size = f"{format_bytes(report.bytes)}, {report.bytes_per_parameter:.3g} bytes per parameter"
    tell(f"{out}: {report.options}: {size}; {kept}")
    if report.dense_bytes is not None and report.bytes > report.dense_bytes:
        say(
            f"note: --format dense would be smaller, {format_bytes(report.dense_bytes)}: much"
            " differs between these two"
        )
    for point in report.text.points if report.text else ():
        tell(
            f"λ = {point.lam}: KL to the exact merge {point.kl:.3g} nats per token,"
            f" {point.agreement:.1%} of tokens agree"
        )


def _range(text: str | None) -> tuple[float, float] | None:
    from pa_fast.base import Lambda

    if text is None:
        return None
    bounds = text.split(":")
    if len(bounds) != 2:
        raise UsageError(
            f"--range {text}, expected LO:HI", "write the least and the largest λ, such as -0.2:1.5"
        )
    return float(Lambda(bounds[0])), float(Lambda(bounds[1]))


def lora(
    delta: Annotated[
        str, typer.Argument(metavar="DELTA", help="A low-rank file of `pa-fast encode`.")
    ],
    base: Base,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="The LoRA folder to write; must be new or empty.")
    ],
    lam: Annotated[
        str,
        typer.Option(
            "--lambda", metavar="L", help="λ of the LoRA: its lora_alpha is λ times the rank."
        ),
    ] = "1",
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what a LoRA cannot hold, such as norms.")
    ] = False,
) -> None:
    """Write a low-rank delta as a LoRA folder that peft loads."""
    from pa_fast.encoding import export_lora

    exported = export_lora(delta, base, out, lam, partial=partial)
    tell(
        f"{out}: {format_count(len(exported.ranks), 'layer')}, rank"
        f" {max(exported.ranks.values())}, λ = {lam}"
    )
    if exported.left_out:
        say(
            f"note: left out {format_count(len(exported.left_out), 'tensor')}, such as"
            f" `{exported.left_out[0]}`"
        )

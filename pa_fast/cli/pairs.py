"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pa_fast.cli.options import (
    Base,
    Dtype,
    ExtraRows,
    IgnoreConfig,
    Instruct,
    Json,
    OneSided,
    RoundingOption,
    RuleOption,
    Seed,
    StripPrefix,
)
from pa_fast.cli.output import byte_bar, say, show, show_json


def inspect(
    base: Base,
    instruct: Instruct,
    sample: Annotated[
        bool, typer.Option("--sample", help="Measure 65,536 weights of every tensor.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Measure all weights.")] = False,
    fidelity: Annotated[
        str | None,
        typer.Option(
            metavar="LAMBDAS",
            help="Measure the effective λ of each of these, after rounding; such as 0:1:0.1.",
        ),
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Draw the delta by layer and module to FILE.png, .svg and .pdf."
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN_DIR",
            help="Keep the delta by layer and module in a run of this pair, for `pa-fast report`.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    rounding: RoundingOption = "nearest",
    seed: Seed = None,
    rule: RuleOption = None,
    extra_rows: ExtraRows = "instruct",
    one_sided: OneSided = None,
    ignore_config: IgnoreConfig = None,
    strip_prefix: StripPrefix = None,
    as_json: Json = False,
) -> None:
    """Check that two checkpoints pair, and measure their difference.

    By default only headers are read, which takes about a second. --sample, --full, --fidelity,
    --figure and --run measure weights; the last three measure a sample unless --full is given.
    """
    from pa_fast.checkpoint.inspect import inspect as run
    from pa_fast.sweep.schedule import lambdas

    grid = lambdas(fidelity) if fidelity is not None else ()
    drawing = (
        None
        if figure is None
        else Path(figure.removesuffix(".png").removesuffix(".svg").removesuffix(".pdf"))
    )
    if drawing is not None:
        from pa_fast.files import check_outside
        from pa_fast.sweep.figure import check_output_path

        check_outside(drawing, (base, instruct))
        check_output_path(drawing)
    if run_folder is not None:
        from pa_fast.report import delta

        delta.check_run(run_folder, base, instruct)
    sample |= (figure is not None or run_folder is not None) and not full
    with byte_bar("measuring", shown=sample or full or fidelity is not None) as bar:
        report = run(
            base,
            instruct,
            sample=sample,
            full=full,
            fidelity=grid,
            dtype=dtype,
            rounding=rounding,
            seed=seed,
            rule=rule,
            extra_rows=extra_rows,
            one_sided=one_sided,
            ignore_config=ignore_config or (),
            strip_prefix=strip_prefix or (),
            progress=bar,
        )
    if as_json:
        show_json(report)
    else:
        from pa_fast.quality.pair_table import parts

        for part in parts(report):
            show(part)
    if drawing is not None:
        from pa_fast.quality import delta_map

        delta_map.write(report, drawing)
    if run_folder is not None:
        delta.keep(report, run_folder)
        say(f"kept in {run_folder}: `pa-fast report {run_folder}` shows it")

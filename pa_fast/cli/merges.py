"""The commands `merge`, which writes a merged checkpoint, and `verify`, which checks one."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pa_fast.base import Lambda
from pa_fast.cli.options import (
    AllowNonfinite,
    Base,
    Dtype,
    ExtraRows,
    IgnoreConfig,
    Instruct,
    Json,
    Keep,
    Objective,
    OneSided,
    RoundingOption,
    RuleOption,
    Seed,
    StripPrefix,
)
from pa_fast.cli.output import byte_bar, show_json
from pa_fast.errors import DataError, UsageError
from pa_fast.terminal import say, tell
from pa_fast.units import format_bytes, format_count, format_rate, format_seconds

if TYPE_CHECKING:
    from pa_fast.checkpoint.merge import MergeReport


def merge(
    out: Annotated[
        str, typer.Option(metavar="DIR", help="The folder to write; must be new or empty.")
    ],
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE", help="The base checkpoint, λ = 0; with --best-of the run's."
        ),
    ] = None,
    instruct: Annotated[
        str | None, typer.Argument(metavar="INSTRUCT", help="The instruct checkpoint, λ = 1.")
    ] = None,
    lam: Annotated[
        str | None, typer.Option("--lambda", metavar="L", help="Any finite λ: 0.6, 1/3, -0.2.")
    ] = None,
    best_of: Annotated[
        str | None,
        typer.Option(
            "--best-of",
            metavar="RUN",
            help="In place of BASE, INSTRUCT and λ: the chosen λ of a run folder.",
        ),
    ] = None,
    objective: Objective = None,
    keep: Keep = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest weight file, such as 5GB; by default files are cut as those of BASE.",
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
    allow_nonfinite: AllowNonfinite = False,
    from_model: Annotated[
        bool,
        typer.Option(
            "--from-model",
            help="Load the pair as `sweep` does, set λ, and write what the live model holds.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DIR if it is a checkpoint without other files."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the merge at one λ as a checkpoint folder.

    transformers loads the folder like any other checkpoint. If a merge is interrupted or killed,
    run the same command again: complete weight files are kept. With
    --best-of, dtype, rounding and rule are those of the run.
    """
    from pa_fast.checkpoint.merge import merge as run

    options: dict[str, Any] = {
        "dtype": dtype,
        "rounding": rounding,
        "seed": seed,
        "rule": rule,
        "allow_nonfinite": allow_nonfinite,
        "extra_rows": extra_rows,
        "one_sided": one_sided,
        "ignore_config": ignore_config or (),
        "strip_prefix": strip_prefix or (),
    }
    output: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    if best_of is not None:
        chosen = _chosen(best_of, lam, objective, keep, base, instruct, options)
        base, instruct, lam = (chosen.pop(name) for name in ("base", "instruct", "lam"))
        output["chosen_from"] = chosen.pop("chosen_from")
        options |= chosen
    elif objective is not None or keep:
        raise UsageError("--objective and --keep are of a run", "name it: --best-of RUN")
    if base is None or instruct is None or lam is None:
        raise UsageError(
            "a merge needs BASE, INSTRUCT and --lambda",
            "write pa-fast merge BASE INSTRUCT --lambda L --out DIR, or --best-of RUN --out DIR",
        )
    if from_model:
        from pa_fast.engines.transformers import load

        exact = Lambda(lam)
        live = load(base, instruct, shared_prefix=False, **options)
        live.set_lambda(float(exact))
        with byte_bar("writing") as bar:
            report = live.save(out, progress=bar, **output)
        return _merged(report, as_json)
    try:
        with byte_bar("merging") as bar:
            report = run(base, instruct, lam, out, progress=bar, **options, **output)
    except KeyboardInterrupt:
        say(
            "\ninterrupted; complete weight files are kept. Go on with:\n "
            f" {shlex.join(['pa-fast', *sys.argv[1:]])}"
        )
        raise typer.Exit(130) from None
    _merged(report, as_json)


def _chosen(
    run: str,
    lam: str | None,
    objective: str | None,
    keep: list[str] | None,
    base: str | None,
    instruct: str | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the merge at the chosen λ of a run, and print the answer."""
    from pa_fast.best_of import best_of, merged_line
    from pa_fast.question import parse_keep

    given = {
        "--lambda": (lam, None),
        "--rule": (options["rule"], None),
        "--seed": (options["seed"], None),
        "--dtype": (options["dtype"], "auto"),
        "--rounding": (options["rounding"], "nearest"),
    }
    for name, (value, usual) in given.items():
        if value != usual:
            raise UsageError(
                f"{name} beside --best-of, which has the run's", "leave out one of both"
            )
    answer, arguments = best_of(
        run, objective, parse_keep(keep) if keep else None, base=base, instruct=instruct
    )
    say(answer.sentence)
    say(merged_line(answer, arguments))
    return arguments


def _merged(report: MergeReport, as_json: bool) -> None:
    if as_json:
        show_json(report)
    else:
        rate = format_rate(report.bytes, report.seconds)
        size = f"{format_bytes(report.bytes)} in {format_count(report.shards, 'file')}"
        tell(
            f"{report.out}: λ = {report.lam}, {report.tensors} tensors, {size},"
            f" {format_seconds(report.seconds)} ({rate})"
        )
        if report.resumed:
            say(
                f"note: {report.resumed} of {format_count(report.shards, 'file')} were complete"
                " from an unfinished run"
            )
        for note in report.notes:
            say(f"note: {note}")


def verify(
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The checkpoint to check.")],
    base: Base,
    instruct: Instruct,
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            metavar="L",
            help="λ of the merge; by default that in MERGED's pa_fast.json.",
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(metavar="R", help="Rounding of the merge; by default that in pa_fast.json."),
    ] = None,
    seed: Seed = None,
    rule: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rule of the merge; by default that in pa_fast.json."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check bit by bit that MERGED is a merge of BASE and INSTRUCT."""
    from pa_fast.checkpoint.verify import verify as run

    with byte_bar("verifying") as bar:
        report = run(
            merged, base, instruct, lam, rounding=rounding, seed=seed, rule=rule, progress=bar
        )
    if as_json:
        show_json(report)
    else:
        if report.ok:
            tell(f"{report.merged}: every bit of {report.tensors} tensors is {report.merge}")
        for note in report.notes:
            say(f"note: {note}")
    if not report.ok:
        wrong = report.differences
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        counted = (
            f" ({wrong[0].differing:,} of {wrong[0].count:,} weights differ)"
            if wrong[0].differing
            else ""
        )
        raise DataError(
            f"{report.merged} is not {report.merge}: `{wrong[0].name}`:"
            f" {wrong[0].reason}{counted}{more}",
            "compare λ, rule, rounding, dtype and the source folders with those in its"
            " pa_fast.json; --json lists every tensor",
        )

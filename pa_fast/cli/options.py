"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base checkpoint, λ = 0.")]
Instruct = Annotated[
    str, typer.Argument(metavar="INSTRUCT", help="The instruct checkpoint, λ = 1.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="D",
        help="bfloat16, float16, float32, or auto: for each tensor its dtype in INSTRUCT.",
    ),
]
RoundingOption = Annotated[
    str,
    typer.Option(
        metavar="R",
        help="nearest, or stochastic: up or down at random, so that λ holds on average.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of stochastic rounding; 0 by default.")
]
RuleOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="YAML file that gives tensors λ of their own; see docs/rules.md."
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The evaluator whose best λ is looked for, or the start of its name.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME>=98%",
        help="The share of its score at λ = 1 that NAME must keep; may be given again.",
    ),
]
ExtraRows = Annotated[
    str,
    typer.Option(
        metavar="P",
        help="Vocabulary rows that only one side has: instruct (keep them as they are) or refuse.",
    ),
]
OneSided = Annotated[
    str | None,
    typer.Option(
        metavar="P",
        help=(
            "Tensors that only one side has and the model does not use: keep, drop or refuse. By"
            " default those that the model class ignores are kept, and others refused."
        ),
    ),
]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config",
        metavar="KEY",
        help="Accept that this key of config.json differs; may be given again.",
    ),
]
StripPrefix = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Remove this from the beginning of tensor names, such as _orig_mod. or module.;"
        " may be given again.",
    ),
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity in the weights.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

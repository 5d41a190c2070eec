"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base checkpoint, λ = 0.")]
Instruct = Annotated[str, typer.Argument(metavar="INSTRUCT", help="The instruct checkpoint, λ = 1.")]
Dtype = Annotated[str, typer.Option(metavar="D", help="bfloat16, float16, float32, or auto: as each tensor is in INSTRUCT.")]
Rounding = Annotated[
    str, typer.Option(metavar="R", help="nearest, or stochastic: λ is followed on average where nearest bends it.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of stochastic rounding; 0 by default.")]
Rule = Annotated[str | None, typer.Option(metavar="FILE", help="YAML rows by which λ spreads over the tensors: docs/rules.md.")]
ExtraRows = Annotated[
    str, typer.Option(metavar="P", help="Vocabulary rows that one side alone has: instruct keeps them as they are, or refuse.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity in the weights pass.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

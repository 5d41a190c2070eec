"""The chosen λ of a run, as the arguments of the merge that saves it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pa_fast.base import BASE, INSTRUCT
from pa_fast.checkpoint.folder import resolve
from pa_fast.checkpoint.provenance import ChosenFrom
from pa_fast.checkpoint.reader import Checkpoint
from pa_fast.errors import RunError, UsageError
from pa_fast.files import path_of
from pa_fast.rounding import Rounding
from pa_fast.rules import LambdaRule
from pa_fast.sweep import manifest, results

if TYPE_CHECKING:
    from pa_fast.stats import Answer


def best_of(
    run: str | os.PathLike[str],
    objective: str | None = None,
    keep: Mapping[str, float] | None = None,
    *,
    base: str | None = None,
    instruct: str | None = None,
) -> tuple[Answer, dict[str, Any]]:
    """Return the answer of a run, and the arguments of `pa_fast.merge` for the weights that it had
    at λ̂: the folders, λ, the dtype, rounding and λ rule of the sweep, and the record of all this.

    Args:
        run: the run folder.
        objective, keep: see `SweepResult.answer`.
        base, instruct: the folders, where they are not those that the run has recorded.

    Raises:
        RunError: not a run folder, or a damaged one; or a checkpoint has changed since.
        UsageError: the run is not one of a base and an instruct folder, or lost some of their
            difference.
    """
    folder = path_of(run, "run folder")
    result, recorded = results.load(folder), manifest.load(folder)
    if result.approximation is not None:
        raise UsageError(
            f"{folder} swept an approximation of the pair: {result.approximation}",
            "sweep with --confirm N, and merge the best of the run in its folder `confirmed`",
        )
    engine = recorded.engine
    configured = recorded.configurations[-1] if recorded.configurations else {}
    folders: dict[str, str] = {}
    for side, given in (("base", base), ("instruct", instruct)):
        fingerprint = engine.get(side)
        is_delta = str(fingerprint).startswith("delta ")
        where = given or (None if is_delta else configured.get(side))
        if where is None or not isinstance(fingerprint, str):
            raise UsageError(
                f"{folder} does not say where its {side} checkpoint is", "name BASE and INSTRUCT"
            )
        folders[side] = where
        if not is_delta:
            _check_same(folder, side, where, fingerprint)
    answer = result.answer(objective, keep)
    try:
        rounding = Rounding.parse(str(engine.get("rounding", "nearest")))
    except UsageError:
        raise RunError(
            f"{folder} has an unknown rounding", "name λ and its options yourself"
        ) from None
    return answer, {
        **folders,
        "lam": answer.chosen.key,
        "dtype": engine.get("dtype", "auto"),
        "rounding": rounding,
        "rule": LambdaRule.of(engine["rule"]) if "rule" in engine else None,
        "chosen_from": ChosenFrom(
            str(run), answer.objective.name, dict(answer.keep), answer.sentence
        ),
    }


def merged_line(answer: Answer, arguments: Mapping[str, Any]) -> str:
    """Return one line on the λ that is merged, from what `best_of` returned: why it is the one
    where the answer cannot be told, and that the merge at an end of the line changes nothing."""
    lam = answer.chosen
    line = f"to be merged: λ = {lam.key}"
    if lam in (BASE, INSTRUCT) and arguments["rule"] is None:
        line += f", {'the base' if lam == BASE else 'the instruct'} checkpoint itself"
    if lam != INSTRUCT and not answer.is_told:
        how = "smoothed score" if answer.objective.refused is None else "score"
        line += f", for the best {how}: whether it is better than λ = 1 cannot be told"
    return line


def _check_same(folder: os.PathLike[str], side: str, where: str, recorded: str) -> None:
    with Checkpoint.open(resolve(where)) as checkpoint:
        now = checkpoint.quick_fingerprint()
    if now != recorded:
        raise RunError(
            f"{where} is not the {side} checkpoint that {folder} swept: recorded quick fingerprint"
            f" {recorded}, now {now}",
            "name the folders that were swept, or sweep again",
        )

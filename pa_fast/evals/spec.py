"""EVAL strings: `NAME:TARGET[,TARGET…][,key=value…]`.

A comma inside a value is written `\\,`. A part is an option if it begins with a word and `=`; write
`./a=b.txt` for a file of such a name. Every evaluator takes `name=…`, its column in the results;
without it the column is `NAME:` with the targets (files without folder and ending) and the options
as given.
"""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from pa_fast.base import Evaluator
from pa_fast.errors import PaFastError, UsageError
from pa_fast.evals import alpaca, function, generation, icl, lm_eval, perplexity
from pa_fast.evals.kind import UNNAMEABLE, EvalSpec

KINDS = {
    kind.name: kind
    for kind in (
        perplexity.KIND,
        icl.KIND,
        generation.KIND,
        alpaca.KIND,
        lm_eval.KIND,
        function.KIND,
    )
}
EXAMPLES = {name: kind.example for name, kind in KINDS.items()}
"""One worked EVAL string for each evaluator."""


def parse(text: str, folder: pathlib.Path = pathlib.Path()) -> EvalSpec:
    """Parse one EVAL string, whose relative paths begin in `folder`; no file is opened.

    Raises:
        UsageError: an unknown evaluator, no target or too many, an unknown or repeated option, an
            unusable name.
    """
    name, _, rest = text.partition(":")
    targets: list[str] = []
    options: dict[str, str] = {}
    # commas that end a part; those behind a backslash are the part's own
    for part in [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", rest)]:
        option = re.match(r"([A-Za-z_]\w*)=(.*)", part, re.DOTALL)
        if option is None and options and name in KINDS:
            raise UsageError(
                f"`{text}`: `{part}` after an option is not key=value",
                "targets come first, then options",
            )
        if option is None:
            targets.append(part)
            continue
        key, value = option.groups()
        if key in options:
            raise UsageError(f"`{text}`: option `{key}` is given twice", "give it once")
        options[key] = value
    return checked(text, name, targets, options, folder)


def checked(
    text: str,
    name: str,
    targets: Sequence[str],
    options: Mapping[str, str],
    folder: pathlib.Path = pathlib.Path(),
) -> EvalSpec:
    """Return an EVAL of its parts, after a check that there is such an evaluator and it takes them;
    `text` is its name in errors.

    Raises:
        UsageError: as for `parse`.
    """
    if name not in KINDS:
        raise UsageError(
            f"`{text}`: there is no evaluator `{name}`",
            f"{nearest(name, KINDS)}evaluators: {', '.join(KINDS)}; for example {EXAMPLES['icl']}",
        )
    kind = KINDS[name]
    known = (*kind.options, "name")
    for key in options:
        if key not in known:
            hint = f"{nearest(key, known)}options of {name}: {', '.join(known)}"
            raise UsageError(f"`{text}`: {name} has no option `{key}`", hint)
    wanted = f"one {kind.takes} or more" if kind.many else f"one {kind.takes}"
    wrong = None
    if not any(targets):
        wrong = f"found no {kind.takes}, {name} takes {wanted}"
    elif not all(targets):
        wrong = "an empty part beside a comma"
    elif len(targets) > 1 and not kind.many:
        wrong = f"found {len(targets)} targets, {name} takes {wanted}"
    if wrong:
        raise UsageError(f"`{text}`: {wrong}", f"for example {kind.example}")
    spec = EvalSpec(text, kind, tuple(targets), dict(options), folder)
    if not spec.column or UNNAMEABLE.search(spec.column):
        raise UsageError(
            f"`{text}`: `{spec.column}` cannot be a column",
            "choose a name without / \\ or line breaks: name=…",
        )
    return spec


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the beginning of a hint with the one of `known` that is nearest to `word`; empty where
    none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def build(spec: EvalSpec | str, *, limit: int | None = None, seed: int = 0) -> Evaluator:
    """Return the evaluator that `spec` names, its data read and checked.

    Args:
        limit: most items, drawn with `seed`.

    Raises:
        UsageError: an option's value is wrong.
        EvaluatorError: the data file or the function is wrong.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} items", "give at least 1")
    try:
        return spec.kind.build(spec, limit, seed)
    except PaFastError as error:
        if not spec.where:
            raise
        raise type(error)(f"{spec.where}: {error.message}", error.hint) from error.__cause__
